"""LoRA, the baseline: one low-rank update, the same for every token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draw import draw_rows
from .base import AdapterLinear, device_of


class LoRALinear(AdapterLinear):
    """base(x) + (alpha / rank) B A x.

    Args:
        base_layer: see `AdapterLinear`.
        rank: rows of A [rank, D], columns of B [O, rank].
        alpha: scale of the update; the default, 2 rank, is the common one.
        dropout: probability of dropping an input feature before A sees it, in [0, 1).
        dtype: of A and B; float32 keeps small updates that bfloat16 loses.
        generator: for the initial A.
    Source: Hu et al., ICLR 2022, arXiv 2106.09685.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base_layer)
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.scale: float = (2 * rank if alpha is None else alpha) / rank
        self.dropout: float = dropout
        like: dict[str, Any] = {"device": device_of(self.base_layer), "dtype": dtype}
        self.lora_A: nn.Parameter = nn.Parameter(torch.empty(0, self.in_features, **like))
        self.lora_A = nn.Parameter(self.new_down(rank, generator))
        self.lora_B: nn.Parameter = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def new_down(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Initial rows of A [rows, D]."""
        return draw_rows((rows, self.in_features), self.lora_A, generator)

    def dropped(self, x: Tensor) -> Tensor:
        """The input as A sees it: in the adapter's dtype, with features dropped in training."""
        x = x.to(self.lora_A.dtype)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        down = F.linear(self.dropped(x), self.lora_A)
        return base + (F.linear(down, self.lora_B) * self.scale).to(base.dtype)
