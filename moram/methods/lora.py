"""Sequential LoRA: one adapter that goes on learning, the baseline without any protection."""

import torch

from ..inject import inject_with
from ..layers import LoRALinear
from .base import Method


class SequentialLoRA(Method):
    """One LoRA trained on task after task; nothing is frozen between them.

    Args:
        rank: equal to MoRAM's atoms per task for as many trained parameters.
        alpha: scale, see `LoRALinear`.
        targets, exclude: as in `MoRAMConfig`.
    """

    name = "sequential LoRA"

    def __init__(self, rank=8, alpha=None, targets="auto", exclude=(), seed=0):
        self.rank, self.alpha, self.targets, self.exclude = rank, alpha, targets, exclude
        self.generator = torch.Generator().manual_seed(seed)

    def setup(self, model):
        def wrap(linear):
            return LoRALinear(linear, self.rank, self.alpha, generator=self.generator)

        inject_with(model, self.targets, self.exclude, wrap)
