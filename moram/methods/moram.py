"""MoRAM: append atoms for each task, freeze the earlier ones."""

import torch

from ..config import MoRAMConfig
from ..inject import grow, inject
from .base import Method


class MoRAM(Method):
    """The bank grows at the start of each task but the first, so no untrained atom is ever scored.

    Source: Lu et al., ICML 2026, arXiv 2506.21035.
    """

    name = "MoRAM"

    def __init__(self, config=None, seed=0):
        self.config = MoRAMConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)

    def setup(self, model):
        inject(model, self.config, generator=self.generator)

    def begin_task(self, model, index):
        if index:
            grow(model, generator=self.generator)
