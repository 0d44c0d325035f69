"""One LoRA a task, all summed: what O-LoRA is without its penalty, and what can be protected."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Unpack

from torch import nn

from ..config import MoRAMConfig
from ..guard import Fresh, Guard, guards
from ..layers import StackedLoRALinear
from ..sketch import Inputs, InputSketch, pack_sketches, remember, unpack_sketches
from .lora import LoRAArguments, LoRAMethod
from .train import Stage


class LoRAStack(LoRAMethod[StackedLoRALinear]):
    """A new LoRA per task beside the frozen earlier ones; all of them act, weighted alike.

    With `protect` set it is this project's addition, that of `moram.task`, for LoRA: the rows of a
    task's A are kept out of the directions of earlier tasks' inputs, by the same sketches, gains
    and settings as the keys of MoRAM. What is left to compare is a sum of all tasks' updates
    against a choice. Needs no task id. Stores one LoRA per task, and with protect the sketches.

    Args:
        lora: see `LoRAMethod`.
        protect, protect_size, protect_examples, protect_strength: see `MoRAMConfig`.
    """

    layer = StackedLoRALinear
    protect: float | None
    protect_size: int
    protect_examples: int
    protect_strength: float

    def __init__(
        self,
        *,
        protect: float | None = None,
        protect_size: int = 256,
        protect_examples: int = 80,
        protect_strength: float = 0.5,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        # Its checks are theirs.
        MoRAMConfig(
            protect=protect,
            protect_size=protect_size,
            protect_examples=protect_examples,
            protect_strength=protect_strength,
        )
        self.protect, self.protect_size = protect, protect_size
        self.protect_examples, self.protect_strength = protect_examples, protect_strength
        self.sketches: dict[str, InputSketch] = {}
        self.name = "LoRA stack" if protect is None else "LoRA stack, protected"

    def setup(self, model: nn.Module) -> None:
        super().setup(model)
        self.model = model

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        if not index:
            return
        layers, fresh = self.layers(model), {}
        for path, layer in layers.items():
            layer.grow(self.generator)
            if self.protect is not None:
                sketch = self.sketches[path]
                settings = (self.protect, self.protect_strength)
                fresh[path] = Fresh(layer.lora_A, layer.frozen_A.flatten(0, 1), sketch, *settings)
        for path, guard in guards(fresh, self._inputs(model, stage)).items() if fresh else ():
            layers[path].guard = guard

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            layer.fold()
        if self.protect is not None:
            inputs = self._inputs(model, stage)
            self.sketches = remember(self.sketches, inputs, self.protect_size)

    def state_dict(self) -> dict[str, Any]:
        held = {path: layer.guard for path, layer in self.layers(self.model).items()}
        held = {path: list(guard) for path, guard in held.items() if guard is not None}
        return super().state_dict() | pack_sketches(self.sketches) | {"guards": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sketches = unpack_sketches(state, self.protect_size)
        for path, layer in self.layers(self.model).items():
            held = state["guards"].get(path)
            layer.guard = None
            if held is not None:
                layer.guard = Guard(held[0].to(layer.lora_A.device), held[1])

    def _inputs(self, model: nn.Module, stage: Stage) -> Inputs:
        run = partial(stage.pass_over, self.protect_examples)
        return Inputs(model, self.layers(model), run)
