"""LoRA experts behind a router: the conventional mixture that MoRAM is compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draw import changes_parameters, draw_rows
from .base import AdapterLinear, device_of


class MoELoRALinear(AdapterLinear):
    """base(x) + (alpha / rank) sum_e g_e(x) B_e A_e x,  g = softmax over the top_k of W x.

    A task adds `experts` experts of rank / experts each. Current: `lora_A` [E, r, D], `lora_B`
    [E, O, r], `router` [R, D]; frozen: `frozen_A` [F, r, D], `frozen_B` [F, O, r], `frozen_router`
    [F, D], or [0, D] while all of the router is trained. Frozen experts come first.

    Args:
        base_layer: see `AdapterLinear`.
        rank: of a task's experts together.
        alpha: the scale is alpha / rank, whatever the granularity; None = 2 rank.
        experts: per task; divides rank.
        top_k: experts that write per token, clipped to those that exist.
        freeze_router: whether the router's rows of earlier experts freeze with them.
        dropout: probability of dropping an input feature before the experts see it (the router
            sees all of them).
        dtype: of experts and router. generator: for the initial A and router.
    Source: Shazeer et al., ICLR 2017, arXiv 1701.06538 (top-k gate), without its noise.
    Cost: 2 M N r (D + O) + 2 M N D FLOPs for N experts: all of them are computed.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router: nn.Parameter
    frozen_A: Tensor
    frozen_B: Tensor
    frozen_router: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        experts: int = 1,
        top_k: int = 2,
        freeze_router: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base_layer)
        if rank < 1 or experts < 1 or rank % experts:
            raise ValueError(f"experts must be >= 1 and divide rank={rank}, got {experts}")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.scale: float = (2 * rank if alpha is None else alpha) / rank
        self.top_k: int = top_k
        self.freeze_router: bool = freeze_router
        self.dropout: float = dropout
        # The gates of the last forward pass in training [..., N], with graph, if asked for.
        self.keep_gates: bool = False
        self.gates: Tensor | None = None
        shape, wide = (experts, rank // experts), self.in_features
        like: dict[str, Any] = {"device": device_of(self.base_layer), "dtype": dtype}
        self.register_buffer("frozen_A", torch.empty(0, shape[1], wide, **like))
        self.register_buffer("frozen_B", torch.empty(0, self.out_features, shape[1], **like))
        self.register_buffer("frozen_router", torch.empty(0, wide, **like))
        self.lora_A = nn.Parameter(draw_rows((*shape, wide), self.frozen_A, generator))
        self.lora_B = nn.Parameter(torch.zeros(experts, self.out_features, shape[1], **like))
        self.router = nn.Parameter(draw_rows((experts, wide), self.frozen_A, generator))

    @property
    def num_experts(self) -> int:
        """Frozen and current experts together."""
        return len(self.frozen_A) + len(self.lora_A)

    @changes_parameters
    def grow(self, generator: torch.Generator | None = None) -> None:
        """Freeze the current experts and start the next task's: A drawn anew, B zero."""
        down, up, router = self.lora_A.detach(), self.lora_B.detach(), self.router.detach()
        self.frozen_A = torch.cat([self.frozen_A, down])
        self.frozen_B = torch.cat([self.frozen_B, up])
        self.lora_A = nn.Parameter(draw_rows(down.shape, down, generator))
        self.lora_B = nn.Parameter(torch.zeros_like(up))
        rows = draw_rows((len(down), self.in_features), down, generator)
        if self.freeze_router:
            self.frozen_router = torch.cat([self.frozen_router, router])
        else:
            rows = torch.cat([router, rows])
        self.router = nn.Parameter(rows)

    def gate(self, x: Tensor) -> Tensor:
        """How much each expert writes for inputs [..., D]: [..., N], zero outside the top_k."""
        logits = F.linear(x, torch.cat([self.frozen_router, self.router]))
        top, chosen = logits.topk(min(self.top_k, logits.shape[-1]), -1)
        return torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        x = x.to(self.lora_A.dtype)
        gates = self.gate(x)
        self.gates = gates if self.keep_gates and self.training else None
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        count = len(self.frozen_A)
        update = _experts(x, gates[..., count:], self.lora_A, self.lora_B)
        if count:
            update = update + _experts(x, gates[..., :count], self.frozen_A, self.frozen_B)
        return base + (update * self.scale).to(base.dtype)


def _experts(x: Tensor, gates: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """sum_e gates_e up_e down_e x."""
    low = F.linear(x, down.flatten(0, 1)).unflatten(-1, down.shape[:2])
    return F.linear((low * gates.unsqueeze(-1)).flatten(-2), up.transpose(0, 1).flatten(1))
