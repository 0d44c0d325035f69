"""LoRA as a pool of rank-1 experts: a batch's first tokens vote for those that write."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..draw import changes_parameters, draw_rows
from .merged_lora import MergedLoRALinear


class RankPoolLinear(MergedLoRALinear):
    """base(x) + (alpha / rank) sum over i in S of b_i (a_i . x) + what earlier tasks kept.

    Expert i is row i of A and column i of B. Every example votes for the `active` experts with the
    highest (R x_0)_i, x_0 [D] its first token and R [r, D] the `router`; S are the `active` experts
    with the most votes of the batch. S is one choice for the whole batch and has no gradient, so
    the router stays as it was drawn. A softmax over R x_0 would not change the order.

    Beside what `MergedLoRALinear` has: `router` [r, D]; `counts` [r], the votes in training since
    the task began. Of equally scored or voted experts the first is taken.

    Args:
        base_layer, rank, alpha, dropout, dtype, generator: see `LoRALinear`.
        active: experts that write, in 1..rank.
    Source: Fa et al., "Decomposing and Composing", AAAI 2026, arXiv 2601.22828 (DAC).
    Cost: 2 M (active + K) (D + O) FLOPs for M tokens, and 2 r D for each example.
    """

    router: Tensor
    counts: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        active: int,
        generator: torch.Generator | None = None,
        **more: Any,
    ) -> None:
        check_count("active", active, 1)
        if active > rank:
            raise ValueError(f"active must be at most rank={rank}, got {active}")
        super().__init__(base_layer, rank, alpha, generator=generator, **more)
        self.active: int = active
        self.register_buffer("router", self.lora_A.new_empty(0, self.in_features))
        self.register_buffer("counts", self.lora_A.new_empty(0, dtype=torch.int64))
        self._draw_router(rank, generator)

    @changes_parameters
    def renew(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Start a task with a fresh pool: A and the router drawn anew, B and the counts zero."""
        self.set_current(rank, generator)
        self._draw_router(rank, generator)

    @changes_parameters
    def merge(self, count: int) -> None:
        """Keep the `count` experts with the most votes, the scale folded into A; drop the rest."""
        kept = self.most_used(count)
        self.keep(self.lora_A[kept] * self.scale, self.lora_B[:, kept])
        self.set_current(0)
        self.router, self.counts = self.router[:0], self.counts[:0]

    def most_used(self, count: int) -> Tensor:
        """The places of the `count` experts with the most votes so far, most votes first."""
        return _first(self.counts, count)

    @torch.no_grad()
    def choose(self, x: Tensor) -> Tensor:
        """S for inputs x [B, T, D] or [B, D], in ascending order; counts the votes in training."""
        first = x[:, 0] if x.dim() == 3 else x
        scores = F.linear(first.to(self.router.dtype), self.router)
        chosen = _first(scores, self.active)
        votes = torch.bincount(chosen.flatten(), minlength=len(self.router))
        if self.training:
            self.counts = self.counts + votes
        return _first(votes, self.active).sort().values

    def current(self, x: Tensor) -> Tensor:
        chosen = self.choose(x)
        down = F.linear(self.dropped(x), self.lora_A[chosen])
        return F.linear(down, self.lora_B[:, chosen]) * self.scale

    def _draw_router(self, rank: int, generator: torch.Generator | None) -> None:
        self.router = draw_rows((rank, self.in_features), self.lora_A, generator)
        self.counts = self.counts.new_zeros(rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.lora_A)}, active={self.active}"


def _first(values: Tensor, count: int) -> Tensor:
    """The places of the highest values along the last axis, the first of equal ones."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
