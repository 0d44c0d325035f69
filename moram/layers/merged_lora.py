"""LoRA that starts anew for each task; what a task keeps goes on acting like base weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoRALinear


class MergedLoRALinear(LoRALinear):
    """A LoRA of the current task beside the ranks that earlier tasks kept.

    Current: `lora_A` [r, D], `lora_B` [O, r], no rows once the task is merged. Kept: `frozen_A`
    [K, D], `frozen_B` [O, K], all scales folded in. Kept as factors, they work beside a quantised
    base, and the base stays as it is. Subclasses say how the current ranks act.

    Args:
        base_layer, rank, alpha, dropout, dtype, generator: see `LoRALinear`.
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
        self.register_buffer("frozen_A", self.lora_A.new_empty(0, self.in_features))
        self.register_buffer("frozen_B", self.lora_B.new_empty(self.out_features, 0))

    def keep(self, down: Tensor, up: Tensor) -> None:
        """Add ranks to those that were kept: down [k, D], up [O, k], without gradients."""
        self.frozen_A = torch.cat([self.frozen_A, down.detach()])
        self.frozen_B = torch.cat([self.frozen_B, up.detach()], 1)

    def set_current(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Fresh current ranks, A drawn and B zero; of rank 0, none."""
        down = self.new_down(rank, generator)
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(down.new_zeros(self.out_features, rank))

    def current(self, x: Tensor) -> Tensor:
        """What the current ranks write for x [..., D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        update = self.current(x) if len(self.lora_A) else None
        if len(self.frozen_A):
            # Merged ranks act like base weights: no dropout.
            kept = F.linear(F.linear(x.to(self.frozen_A.dtype), self.frozen_A), self.frozen_B)
            update = kept if update is None else update + kept
        return base if update is None else base + update.to(base.dtype)
