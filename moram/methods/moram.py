"""MoRAM: append atoms for each task, freeze the earlier ones."""

import torch

from ..config import MoRAMConfig
from ..inject import adapters, grow, inject
from .base import Method
from .protection import KeyProtection


class MoRAM(Method):
    """The bank grows at the start of each task but the first, so no untrained atom is ever scored.

    Args:
        config: `MoRAMConfig`.
        seed: of the keys.
        protect: None is the published rule. A number in (0, 1) is this project's addition, see
            `moram.methods.protection.KeyProtection`: new keys stay out of the directions that hold
            this part of the second moment of earlier tasks' inputs.
        protect_size, protect_examples, protect_strength: directions per layer at most; examples
            per task that they are measured on; of the new atoms' first scores.
    Source: Lu et al., ICML 2026, arXiv 2506.21035. The projection is that of gradient projection
        memory (Saha et al., ICLR 2021, arXiv 2103.09762), here for keys, and not for gradients.
    """

    def __init__(
        self,
        config=None,
        seed=0,
        protect=None,
        protect_size=256,
        protect_examples=80,
        protect_strength=0.5,
    ):
        self.config = MoRAMConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)
        self.protection = None
        if protect is not None:
            self.protection = KeyProtection(
                protect, protect_size, protect_examples, protect_strength
            )

    @property
    def name(self):
        """The name that tables show."""
        return "MoRAM" if self.protection is None else "MoRAM, protected"

    def setup(self, model):
        self.model = model
        inject(model, self.config, generator=self.generator)

    def begin_task(self, model, index, stage):
        if index:
            grow(model, generator=self.generator)
            if self.protection is not None:
                self.protection.begin(adapters(model), stage)

    def end_task(self, model, index, stage):
        if self.protection is not None:
            self.protection.end(adapters(model), stage)

    def state_dict(self):
        state = super().state_dict()
        if self.protection is not None:
            state["protection"] = self.protection.state_dict()
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.protection is not None:
            self.protection.load_state_dict(state["protection"])
            self.protection.resume(adapters(self.model))
