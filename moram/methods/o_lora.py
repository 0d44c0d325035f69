"""O-LoRA: each task learns in a subspace orthogonal to those of the earlier tasks."""

from typing import Unpack

from torch import Tensor, nn

from ..layers import StackedLoRALinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod
from .train import Stage


class OLoRA(LoRAMethod[StackedLoRALinear]):
    """A new LoRA per task beside the frozen earlier ones; all of them act, weighted alike.

    penalty = lambda1 * sum over modules and earlier tasks t of sum |A_t A^T|
            + lambda2 * sum over the current A and B of their L2 norm (not squared)

    The first term is zero in the first task and positive from the second on. Needs no task id.
    Stores one LoRA per task.

    Args:
        lora: see `LoRAMethod`.
        lambda1: weight of orthogonality, >= 0; the authors advise 0 to 5.
        lambda2: weight of the norms, >= 0; the authors advise 0 to 0.5.
    Source: Wang et al., EMNLP Findings 2023, arXiv 2310.14152.
    Cost: 2 T rank^2 D FLOPs a module and step for T earlier tasks, besides the stack's own.
    """

    name = "O-LoRA"
    layer = StackedLoRALinear
    lambda1: float
    lambda2: float

    def __init__(
        self,
        *,
        lambda1: float = 0.5,
        lambda2: float = 0.0,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if lambda1 < 0 or lambda2 < 0:
            raise ValueError(f"lambda1 and lambda2 must be >= 0, got {lambda1} and {lambda2}")
        self.lambda1, self.lambda2 = lambda1, lambda2

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        if index:
            for layer in self.layers(model).values():
                layer.grow(self.generator)

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        terms = []
        for layer in self.layers(model).values():
            if self.lambda1 and layer.num_frozen:
                overlap = layer.frozen_A.flatten(0, 1) @ layer.lora_A.T
                terms.append(self.lambda1 * overlap.abs().sum())
            if self.lambda2:
                terms.append(self.lambda2 * (layer.lora_A.norm() + layer.lora_B.norm()))
        return total(terms) if terms else None
