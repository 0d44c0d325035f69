"""One LoRA on the data of all tasks at once: no stream, an upper bound."""

from .lora import LoRAMethod


class JointLoRA(LoRAMethod):
    """One LoRA, one stage that sees every task's training data.

    Needs no task id. Stores one LoRA, but needs all data together.

    Args:
        rank, alpha, targets, exclude, seed, dropout: see `LoRAMethod`.
    """

    name = "joint LoRA"

    def stages(self, count):
        return [tuple(range(count))]
