"""LoRA, the baseline: one low-rank update, the same for every token."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import AdapterLinear


class LoRALinear(AdapterLinear):
    """base(x) + (alpha / rank) B A x.

    Args:
        base_layer: see `AdapterLinear`.
        rank: rows of A [rank, D], columns of B [O, rank].
        alpha: scale of the update; the default, 2 rank, is the common one.
        dtype: of A and B; float32 keeps small updates that bfloat16 loses.
        generator: for the initial A.
    Source: Hu et al., ICLR 2022, arXiv 2106.09685.
    """

    def __init__(self, base_layer, rank, alpha=None, *, dtype=torch.float32, generator=None):
        super().__init__(base_layer)
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        self.scale = (2 * rank if alpha is None else alpha) / rank
        like = {"device": base_layer.weight.device, "dtype": dtype}
        device = like["device"] if generator is None else generator.device
        bound = 1 / math.sqrt(self.in_features)
        down = torch.empty(rank, self.in_features, dtype=dtype, device=device)
        down.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down.to(like["device"]))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def forward(self, x):
        base = self.base_layer(x)
        down = F.linear(x.to(self.lora_A.dtype), self.lora_A)
        return base + (F.linear(down, self.lora_B) * self.scale).to(base.dtype)
