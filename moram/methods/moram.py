"""MoRAM: append atoms for each task, freeze the earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from ..bank import AtomBank
from ..config import MoRAMConfig
from ..inject import adapters, inject
from ..sketch import pack_sketches, unpack_sketches
from ..task import begin_task, end_task
from .base import Classifier, Images, ImageStage, Method

if TYPE_CHECKING:
    from ..models.clip import Clip
    from .train import Stage

# Arguments that are not of the config.
OWN = ("seed", "zero_shot_first")


class MoRAM(Method):
    """The bank grows at the start of each task but the first, so no untrained atom is ever scored.

    Args:
        config: `MoRAMConfig`; with `protect` or `alignment` set it is this project's addition to
            the published rule, see `moram.task` and `MoRAMConfig`.
        seed: of the keys.
        zero_shot_first: for CLIP alone, and this project's addition, too: an image whose answer
            without the atoms is a class of no learned task keeps that answer. The others get that
            of the adapted model, among all classes. So an image of a task to come that zero-shot
            has right stays right. After the last task nothing changes, if all classes are learned.
            RAIL asks zero-shot in the same way, see `moram.methods.rail.fuse`. Costs a pass of the
            model without atoms at test.
    Source: Lu et al., ICML 2026, arXiv 2506.21035.
    """

    config: MoRAMConfig

    def __init__(
        self, config: MoRAMConfig | None = None, seed: int = 0, zero_shot_first: bool = False
    ) -> None:
        if not isinstance(zero_shot_first, bool):
            raise TypeError(f"zero_shot_first must be true or false, got {zero_shot_first!r}")
        self.config = MoRAMConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)
        self.zero_shot_first = zero_shot_first
        self.needs = "clip" if zero_shot_first else None
        # Of the tasks learned so far, where it is asked for.
        self.classes = 0
        additions = {"protected": self.config.protect is not None}
        additions["aligned"] = self.config.alignment > 0
        additions["zero-shot first"] = zero_shot_first
        self.name = ", ".join(["MoRAM", *(name for name, is_on in additions.items() if is_on)])

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        """`rank`, as methods on LoRA call atoms_per_task; the fields of `MoRAMConfig`; `OWN`."""
        return ("rank", *(field.name for field in fields(MoRAMConfig)), *OWN)

    @classmethod
    def make(cls, **arguments: Any) -> Self:
        """This method from plain settings; top_k is rank unless given."""
        if "rank" in arguments:
            if "atoms_per_task" in arguments:
                raise ValueError("rank and atoms_per_task are the same setting: give one of them")
            arguments["atoms_per_task"] = arguments.pop("rank")
        if "atoms_per_task" in arguments:
            arguments.setdefault("top_k", arguments["atoms_per_task"])
        own = {name: arguments.pop(name) for name in OWN if name in arguments}
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
        if self.zero_shot_first:
            images = cast(ImageStage, stage)
            self.classes = images.offset + images.count

    def classifier(self, clip: Clip, prompts: Tensor) -> Classifier:
        adapted = super().classifier(clip, prompts)
        if not self.zero_shot_first:
            return adapted
        with self._without_atoms():
            frozen = super().classifier(clip, prompts)

        def classify(images: Images) -> Tensor:
            with self._without_atoms():
                first = frozen(images)
            is_learned = first.argmax(1, keepdim=True) < self.classes
            return torch.where(is_learned, adapted(images), first)

        return classify

    @contextmanager
    def _without_atoms(self) -> Iterator[None]:
        found = adapters(self.model).values()
        for adapter in found:
            adapter.paused = True
        try:
            yield
        finally:
            for adapter in found:
                adapter.paused = False

    def state_dict(self) -> dict[str, Any]:
        state, banks = super().state_dict(), self._banks()
        state["learned"] = {path: bank.learned for path, bank in banks.items()}
        if self.zero_shot_first:
            state["classes"] = self.classes
        if self.config.protect is not None:
            state |= pack_sketches({p: b.sketch for p, b in banks.items() if b.sketch is not None})
            guards = {p: b.guard for p, b in banks.items() if b.guard is not None}
            state["guards"] = {p: list(guard) for p, guard in guards.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.classes = state.get("classes", 0)
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
