"""One LoRA per task, chosen by the task's id: no forgetting, an upper bound."""

from torch import nn

from ..layers import StackedLoRALinear
from .lora import LoRAMethod
from .train import Stage


class TaskLoRA(LoRAMethod[StackedLoRALinear]):
    """A LoRA of its own for each task, frozen when the task ends.

    Inference needs the task id (`select`), which the other methods are not told. Until it is given
    the current task's LoRA acts; a task that was not learned yet gets the base model. Stores one
    LoRA per task.

    Args:
        rank, alpha, targets, exclude, seed, dropout: see `LoRAMethod`.
    """

    name = "LoRA per task"
    needs_task_id = True
    layer = StackedLoRALinear

    def wrap(self, linear: nn.Module) -> StackedLoRALinear:
        return super().wrap(linear, separate=True)

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            layer.selected = None
            if index:
                layer.grow(self.generator)

    def select(self, model: nn.Module, index: int) -> None:
        for layer in self.layers(model).values():
            layer.selected = index
