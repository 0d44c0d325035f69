"""MoRAM: append atoms for each task, freeze the earlier ones."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from ..bank import AtomBank
from ..config import MoRAMConfig
from ..inject import adapters, inject
from ..sketch import pack_sketches, unpack_sketches
from ..task import begin_task, end_task
from .base import Method
from .train import Stage


class MoRAM(Method):
    """The bank grows at the start of each task but the first, so no untrained atom is ever scored.

    Args:
        config: `MoRAMConfig`; with `protect` set it is this project's addition to the published
            rule, see `moram.task`.
        seed: of the keys.
    Source: Lu et al., ICML 2026, arXiv 2506.21035.
    """

    config: MoRAMConfig

    def __init__(self, config: MoRAMConfig | None = None, seed: int = 0) -> None:
        self.config = MoRAMConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)
        self.name = "MoRAM" if self.config.protect is None else "MoRAM, protected"

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        """`rank`, as methods on LoRA call atoms_per_task; the fields of `MoRAMConfig`; `seed`."""
        return ("rank", *(field.name for field in fields(MoRAMConfig)), "seed")

    @classmethod
    def make(cls, **arguments: Any) -> Self:
        """This method from plain settings; top_k is rank unless given."""
        if "rank" in arguments:
            if "atoms_per_task" in arguments:
                raise ValueError("rank and atoms_per_task are the same setting: give one of them")
            arguments["atoms_per_task"] = arguments.pop("rank")
        if "atoms_per_task" in arguments:
            arguments.setdefault("top_k", arguments["atoms_per_task"])
        own = {name: arguments.pop(name) for name in ("seed",) if name in arguments}
        return cls(MoRAMConfig(**arguments), **own)

    def setup(self, model: nn.Module) -> None:
        self.model = model
        inject(model, self.config, generator=self.generator)

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for bank in self._banks().values():
            # Whoever begins the next task has learned the one before.
            bank.learned = index > 0
        begin_task(model, self._pass_over(stage), generator=self.generator)

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        end_task(model, self._pass_over(stage))

    def state_dict(self) -> dict[str, Any]:
        state, banks = super().state_dict(), self._banks()
        state["learned"] = {path: bank.learned for path, bank in banks.items()}
        if self.config.protect is not None:
            state |= pack_sketches({p: b.sketch for p, b in banks.items() if b.sketch is not None})
            guards = {p: b.guard for p, b in banks.items() if b.guard is not None}
            state["guards"] = {p: list(guard) for p, guard in guards.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        sketches = unpack_sketches(state, self.config.protect_size)
        for path, bank in self._banks().items():
            bank.learned = state["learned"][path]
            bank.sketch = sketches.get(path)
            bank.guard = None
            if path in state.get("guards", {}):
                basis, gain = state["guards"][path]
                bank.guard_keys(basis.to(bank.current_keys.device), gain)

    def _pass_over(self, stage: Stage) -> Callable[[], None]:
        return partial(stage.pass_over, self.config.protect_examples)

    def _banks(self) -> dict[str, AtomBank]:
        return {path: adapter.bank for path, adapter in adapters(self.model).items()}
