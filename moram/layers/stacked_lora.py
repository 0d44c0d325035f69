"""LoRA that keeps what earlier tasks learned as a frozen stack beside the current factors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draw import changes_parameters
from ..guard import Guard
from .lora import LoRALinear


class StackedLoRALinear(LoRALinear):
    """base(x) + (alpha / rank) (sum_t B_t A_t x + B A x), all tasks' factors or those of one.

    `lora_A`, `lora_B` are the current task's and the only parameters; `frozen_A` [T, rank, D] and
    `frozen_B` [T, O, rank] hold the T earlier tasks'. Under a `guard` the current A acts as that
    says, and is trained so; it is not part of `adapter_state`, and `fold` ends it.

    Args:
        base_layer, rank, alpha, dropout, dtype, generator: see `LoRALinear`.
        separate: if true, one task's factors act at a time, those of `selected`.
    Source: Wang et al., EMNLP Findings 2023, arXiv 2310.14152 (O-LoRA).
    Cost: 2 M T rank (D + O) FLOPs beside the current ones; no gradient work for the stack but that
    of the input.
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
        separate: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(base_layer, rank, alpha, **more)
        self.separate: bool = separate
        # The task whose factors act if they act alone; None = the current one.
        self.selected: int | None = None
        self.guard: Guard | None = None
        self.register_buffer("frozen_A", self.lora_A.new_empty(0, *self.lora_A.shape))
        self.register_buffer("frozen_B", self.lora_B.new_empty(0, *self.lora_B.shape))

    @property
    def num_frozen(self) -> int:
        """Earlier tasks whose factors are kept."""
        return self.frozen_A.shape[0]

    def acting_A(self) -> Tensor:
        """The current A as it acts, [rank, D]."""
        return self.lora_A if self.guard is None else self.guard.acting(self.lora_A)

    @torch.no_grad()
    def fold(self) -> None:
        """End the guard; the output stays what it was."""
        self.lora_A.copy_(self.acting_A())
        self.guard = None

    @changes_parameters
    def grow(self, generator: torch.Generator | None = None) -> None:
        """Freeze the current factors and start the next task's: A drawn anew, B zero."""
        if self.guard is not None:
            self.fold()
        down, up = self.lora_A.detach(), self.lora_B.detach()
        self.frozen_A = torch.cat([self.frozen_A, down.unsqueeze(0)])
        self.frozen_B = torch.cat([self.frozen_B, up.unsqueeze(0)])
        self.lora_A = nn.Parameter(self.new_down(len(down), generator))
        self.lora_B = nn.Parameter(torch.zeros_like(up))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        x = self.dropped(x)
        if not self.separate:
            update = F.linear(F.linear(x, self.acting_A()), self.lora_B)
            if self.num_frozen:
                update = update + F.linear(
                    F.linear(x, self.frozen_A.flatten(0, 1)),
                    self.frozen_B.transpose(0, 1).flatten(1),
                )
        elif self.selected is None or self.selected == self.num_frozen:
            update = F.linear(F.linear(x, self.acting_A()), self.lora_B)
        elif self.selected < self.num_frozen:
            down, up = self.frozen_A[self.selected], self.frozen_B[self.selected]
            update = F.linear(F.linear(x, down), up)
        else:
            # No task has trained these factors yet.
            return base
        return base + (update * self.scale).to(base.dtype)
