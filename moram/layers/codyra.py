"""LoRA whose ranks have learnable gates, so that those of no use can be dropped."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draw import changes_parameters
from .merged_lora import MergedLoRALinear


class CoDyRALinear(MergedLoRALinear):
    """base(x) + (alpha / rank) B (g * A x) + the ranks of earlier tasks that were kept.

    Beside what `MergedLoRALinear` has: `gate` [r], of no numbers once the task is merged. Gates are
    folded into what is kept.

    Args:
        base_layer, rank, alpha, dropout, dtype, generator: see `LoRALinear`.
    Source: Lu et al., "Adaptive Rank, Reduced Forgetting", arXiv 2412.01004 (CoDyRA).
    Cost: 2 M (r + K) (D + O) FLOPs.
    """

    gate: nn.Parameter

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
        self.gate = nn.Parameter(self._new_gate(rank, generator))

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """Soft threshold of the gates: towards zero by amount, those within amount become zero."""
        size = self.gate.abs()
        shrunk = self.gate.sign() * (size - amount)
        self.gate.copy_(torch.where(size > amount, shrunk, torch.zeros_like(shrunk)))

    @changes_parameters
    def merge(self) -> None:
        """Keep the current ranks whose gate is not zero, drop the others; outputs stay."""
        kept = self.gate != 0
        up = self.lora_B * (self.gate * self.scale)
        self.keep(self.lora_A[kept], up[:, kept])
        self._start(0)

    @changes_parameters
    def renew(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Start a task with fresh ranks: A drawn anew, B zero, gates standard normal."""
        self._start(rank, generator)

    def current(self, x: Tensor) -> Tensor:
        down = F.linear(self.dropped(x), self.lora_A)
        return F.linear(down * self.gate, self.lora_B) * self.scale

    def _start(self, rank: int, generator: torch.Generator | None = None) -> None:
        self.set_current(rank, generator)
        self.gate = nn.Parameter(self._new_gate(rank, generator))

    def _new_gate(self, rank: int, generator: torch.Generator | None) -> Tensor:
        like = self.lora_A
        device = like.device if generator is None else generator.device
        gate = torch.empty(rank, dtype=like.dtype, device=device)
        return gate.normal_(generator=generator).to(like.device)
