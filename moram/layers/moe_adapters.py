"""Bottleneck experts beside the MLP of a transformer block, behind one router per task."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..draw import changes_parameters, draw_rows
from .beside_mlp import BesideMLP

# The tensors of an expert, stacked over experts: [E, W, D], [E, W], [E, D, W] and [E, D].
PARTS = ("down", "down_bias", "up", "up_bias")
# What the standard deviation of the gate's noise is at least.
MIN_NOISE = 0.01


class MoEAdapterMLP(BesideMLP):
    """MLP(x) + sum_e g_e(h) scale Up_e dropout(relu(Down_e h)),  x = norm(h).

    h [B, T, D] is the block's residual stream after its attention, which a hook on the norm notes
    (`listen`). g is the softmax over the top_k of h_0 R, h_0 token 0, R [D, E] the router in use:
    a choice per sample, for all its tokens. While the current router trains, the logits are
    h_0 R + N(0, 1) (softplus(h_0 S) + 0.01), S [D, E] its `noise`. Noise and dropout are drawn from
    torch's global generator.

    Experts are shared by all tasks and known by their place, 0..E-1. `frozen` [E] says which learn
    no more: these are rows of `frozen_down` and so on, the others rows of the parameters `down` and
    so on, both in the order of the experts. `router` and `noise` [1, D, E] are the current task's
    ([0, D, E] before the first), `routers` [T, D, E] those of earlier tasks, whose noise is gone.
    `counts` [E] are the samples that each expert wrote for in this task's training.

    `task` is the router in use; -1 = none, then this is the MLP alone. A loaded state uses its
    newest router.

    Args:
        base_layer: the MLP. features: D.
        experts, top_k: E, and how many of them write per sample (clipped to E).
        width: W, the bottleneck. scale: of the experts' outputs.
        dropout: probability of dropping a number of the bottleneck, in training.
        dtype: of experts and routers. generator: for the initial Down; all else starts at zero.
    Source: Yu et al., CVPR 2024, arXiv 2403.11549; Shazeer et al., ICLR 2017, arXiv 1701.06538
        (noisy top-k gate).
    Cost: 4 B T top_k W D FLOPs: only chosen experts are computed.
    """

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    frozen_down: Tensor
    frozen_down_bias: Tensor
    frozen_up: Tensor
    frozen_up_bias: Tensor
    router: nn.Parameter
    noise: nn.Parameter
    routers: Tensor
    counts: Tensor
    frozen: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        features: int,
        *,
        experts: int = 22,
        top_k: int = 2,
        width: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("experts", experts), ("top_k", top_k), ("width", width)):
            check_count(name, value, 1)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        super().__init__(base_layer)
        self.top_k: int = min(top_k, experts)
        self.scale: float = scale
        self.dropout: float = dropout
        self.task: int = -1
        like = self.like(dtype)
        shapes = ((width, features), (width,), (features, width), (features,))
        for name, shape in zip(PARTS, shapes, strict=True):
            rows = like.new_zeros(experts, *shape)
            if name == "down":
                rows = draw_rows(rows.shape, like, generator)
            setattr(self, name, nn.Parameter(rows))
            self.register_buffer(f"frozen_{name}", like.new_empty(0, *shape))
        self.router = nn.Parameter(like.new_empty(0, features, experts))
        self.noise = nn.Parameter(like.new_empty(0, features, experts))
        self.register_buffer("routers", like.new_empty(0, features, experts))
        self.register_buffer("counts", like.new_zeros(experts, dtype=torch.int64))
        self.register_buffer("frozen", like.new_zeros(experts, dtype=torch.bool))
        self._note_frozen()

    @property
    def num_routers(self) -> int:
        """Tasks that have a router, the current one included."""
        return len(self.routers) + len(self.router)

    def use(self, task: int) -> None:
        """Put a task's router in use; -1 = none."""
        if not -1 <= task < self.num_routers:
            raise ValueError(f"task must be in -1..{self.num_routers - 1}, got {task}")
        self.task = task

    @changes_parameters
    def grow(self) -> None:
        """Start a task: freeze the current router, put a new one in use, and count anew."""
        self.routers = torch.cat([self.routers, self.router.detach()])
        fresh = self.router.new_zeros(1, *self.router.shape[1:])
        self.router, self.noise = nn.Parameter(fresh), nn.Parameter(fresh.clone())
        self.counts = torch.zeros_like(self.counts)
        self.use(self.num_routers - 1)

    @changes_parameters
    def freeze(self, n: int) -> None:
        """Freeze the n experts most used by this task, of those that still learn.

        An expert that the task has never used stays free; of equally used ones the first freezes.
        Needs a new optimiser afterwards.
        """
        counts = self.counts.masked_fill(self.frozen, 0).tolist()
        order = sorted(range(len(counts)), key=lambda e: -counts[e])
        mask = self.frozen.clone()
        mask[[e for e in order[:n] if counts[e]]] = True
        for name in PARTS:
            rows = torch.stack(self._rows(name))
            setattr(self, f"frozen_{name}", rows[mask])
            setattr(self, name, nn.Parameter(rows[~mask]))
        self.frozen = mask
        self._note_frozen()

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_adapter_state(state)
        self._note_frozen()
        self.use(self.num_routers - 1)

    def _note_frozen(self) -> None:
        # On the host, so that no forward pass waits for the device to read it.
        self._is_frozen = self.frozen.tolist()

    def _rows(self, name: str) -> list[Tensor]:
        """One tensor of every expert, in the experts' order."""
        free, held = (iter(getattr(self, n).unbind()) for n in (name, f"frozen_{name}"))
        return [next(held if is_frozen else free) for is_frozen in self._is_frozen]

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of the chosen experts and their places, [B, top_k] each, for tokens 0 [B, D]."""
        is_current = self.task == len(self.routers)
        logits = x @ (self.router[0] if is_current else self.routers[self.task])
        if is_current and self.training:
            spread = F.softplus(x @ self.noise[0]) + MIN_NOISE
            logits = logits + torch.randn_like(logits) * spread
        top, chosen = logits.topk(self.top_k, -1)
        if is_current and self.training:
            used = torch.bincount(chosen.flatten(), minlength=len(self.counts))
            self.counts = self.counts + used
        return top.softmax(-1), chosen

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        if self.task < 0:
            self.drop_residual()
            return base
        return base + self._update(self.take_residual().to(self.up.dtype)).to(base.dtype)

    def _update(self, h: Tensor) -> Tensor:
        gates, chosen = self.gate(h[:, 0])
        experts = list(zip(*(self._rows(name) for name in PARTS), strict=True))
        update = torch.zeros_like(h)
        for expert in chosen.unique().tolist():
            down, down_bias, up, up_bias = experts[expert]
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            hidden = F.relu(F.linear(h.index_select(0, rows), down, down_bias))
            gate = self.scale * gates[rows, place][:, None, None]
            # The gate acts on the bottleneck, where fewer numbers are kept for backward.
            hidden = F.dropout(hidden, self.dropout, self.training) * gate
            written = F.linear(hidden, up) + gate * up_bias
            update.index_add_(0, rows, written.to(update.dtype))
        return update

    def extra_repr(self) -> str:
        experts, free = len(self._is_frozen), len(self.down)
        return f"experts={experts}, free={free}, top_k={self.top_k}, routers={self.num_routers}"
