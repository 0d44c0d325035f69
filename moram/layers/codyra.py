"""LoRA whose ranks have learnable gates, so that those of no use can be dropped."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draw import changes_parameters
from .lora import LoRALinear


class CoDyRALinear(LoRALinear):
    """base(x) + (alpha / rank) B (g * A x) + the ranks of earlier tasks that were kept.

    Current: `lora_A` [r, D], `lora_B` [O, r], `gate` [r], none of them once the task is merged;
    kept: `frozen_A` [K, D], `frozen_B` [O, K] with gates and scale folded in. Kept as factors, they
    work beside a quantised base, and the base stays as it is.

    Args:
        base_layer, rank, alpha, dropout, dtype, generator: see `LoRALinear`.
    Source: Lu et al., "Adaptive Rank, Reduced Forgetting", arXiv 2412.01004 (CoDyRA).
    Cost: 2 M (r + K) (D + O) FLOPs.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    frozen_A: Tensor
    frozen_B: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        generator: torch.Generator | None = None,
        **more: Any,
    ) -> None:
        super().__init__(base_layer, rank, alpha, generator=generator, **more)
        self.gate: nn.Parameter = nn.Parameter(self._new_gate(rank, generator))
        self.register_buffer("frozen_A", self.lora_A.new_empty(0, self.in_features))
        self.register_buffer("frozen_B", self.lora_B.new_empty(self.out_features, 0))

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """Soft threshold of the gates: towards zero by amount, those within amount become zero."""
        size = self.gate.abs()
        shrunk = self.gate.sign() * (size - amount)
        self.gate.copy_(torch.where(size > amount, shrunk, torch.zeros_like(shrunk)))

    @changes_parameters
    def merge(self) -> None:
        """Keep the current ranks whose gate is not zero, drop the others; outputs stay."""
        kept = self.gate.detach() != 0
        up = self.lora_B.detach() * (self.gate.detach() * self.scale)
        self.frozen_A = torch.cat([self.frozen_A, self.lora_A.detach()[kept]])
        self.frozen_B = torch.cat([self.frozen_B, up[:, kept]], 1)
        self._set_current(self.lora_A.detach()[:0], up[:, :0], self.gate.detach()[:0])

    @changes_parameters
    def renew(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Start a task with fresh ranks: A drawn anew, B zero, gates standard normal."""
        down = self.new_down(rank, generator)
        up = self.lora_B.new_zeros(self.out_features, rank)
        self._set_current(down, up, self._new_gate(rank, generator))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        update = None
        if len(self.gate):
            down = F.linear(self.dropped(x), self.lora_A)
            update = F.linear(down * self.gate, self.lora_B) * self.scale
        if len(self.frozen_A):
            # Merged ranks act like base weights: no dropout.
            kept = F.linear(F.linear(x.to(self.frozen_A.dtype), self.frozen_A), self.frozen_B)
            update = kept if update is None else update + kept
        return base if update is None else base + update.to(base.dtype)

    def _new_gate(self, rank: int, generator: torch.Generator | None) -> Tensor:
        like = self.lora_A
        device = like.device if generator is None else generator.device
        gate = torch.empty(rank, dtype=like.dtype, device=device)
        return gate.normal_(generator=generator).to(like.device)

    def _set_current(self, down: Tensor, up: Tensor, gate: Tensor) -> None:
        self.lora_A, self.lora_B = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.gate = nn.Parameter(gate.clone())
