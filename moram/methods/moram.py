"""MoRAM: append atoms for each task, freeze the earlier ones."""

from functools import partial

import torch

from ..config import MoRAMConfig
from ..inject import adapters, inject
from ..sketch import pack_sketches, unpack_sketches
from ..task import begin_task, end_task
from .base import Method


class MoRAM(Method):
    """The bank grows at the start of each task but the first, so no untrained atom is ever scored.

    Args:
        config: `MoRAMConfig`; with `protect` set it is this project's addition to the published
            rule, see `moram.task`.
        seed: of the keys.
    Source: Lu et al., ICML 2026, arXiv 2506.21035.
    """

    def __init__(self, config=None, seed=0):
        self.config = MoRAMConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def name(self):
        """The name that tables show."""
        return "MoRAM" if self.config.protect is None else "MoRAM, protected"

    def setup(self, model):
        self.model = model
        inject(model, self.config, generator=self.generator)

    def begin_task(self, model, index, stage):
        for bank in self._banks().values():
            # Whoever begins the next task has learned the one before.
            bank.learned = index > 0
        begin_task(model, self._pass_over(stage), generator=self.generator)

    def end_task(self, model, index, stage):
        end_task(model, self._pass_over(stage))

    def state_dict(self):
        state, banks = super().state_dict(), self._banks()
        state["learned"] = {path: bank.learned for path, bank in banks.items()}
        if self.config.protect is not None:
            state |= pack_sketches({p: b.sketch for p, b in banks.items() if b.sketch is not None})
            guards = {p: b.guard for p, b in banks.items() if b.guard is not None}
            state["guards"] = {p: list(guard) for p, guard in guards.items()}
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        sketches = unpack_sketches(state, self.config.protect_size)
        for path, bank in self._banks().items():
            bank.learned = state["learned"][path]
            bank.sketch = sketches.get(path)
            bank.guard = None
            if path in state.get("guards", {}):
                basis, gain = state["guards"][path]
                bank.guard_keys(basis.to(bank.current_keys.device), gain)

    def _pass_over(self, stage):
        return partial(stage.pass_over, self.config.protect_examples)

    def _banks(self):
        return {path: adapter.bank for path, adapter in adapters(self.model).items()}
