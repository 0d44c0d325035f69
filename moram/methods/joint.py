"""One LoRA on the data of all tasks at once: no stream, an upper bound."""

from ..layers import LoRALinear
from .lora import LoRAMethod


class JointLoRA(LoRAMethod[LoRALinear]):
    """One LoRA, one stage that sees every task's training data.

    Needs no task id. Stores one LoRA, but needs all data together.

    Args:
        rank, alpha, targets, exclude, seed, dropout: see `LoRAMethod`.
    """

    name = "joint LoRA"
    layer = LoRALinear

    def stages(self, count: int) -> list[tuple[int, ...]]:
        return [tuple(range(count))]
