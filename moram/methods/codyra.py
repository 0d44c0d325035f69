"""CoDyRA: gates decide how many ranks a task keeps, and what is kept is merged."""

from typing import Unpack

from torch import nn

from ..layers import CoDyRALinear
from .base import Step
from .lora import LoRAArguments, LoRAMethod
from .train import Stage

# The grid of thresholds that the authors step through.
GRID = 50


class CoDyRA(LoRAMethod[CoDyRALinear]):
    """LoRA with a learnable gate per rank, sparse through a growing soft threshold.

    After each optimiser step g <- 1(|g| > kappa) (g - sign(g) kappa), as published; the authors'
    code also zeroes gates between kappa and 2 kappa. kappa is 0 for the first dense_iters of a
    task, then climbs a grid of 50 equal steps from 0 to max_kappa. When the task ends, ranks with
    a zero gate are dropped and the others are merged: kept as frozen factors that act like base
    weights.

    The published layer has no scale: alpha = rank gives it. Needs no task id. Stores the kept ranks
    of all tasks; merged into the base weights they would cost nothing.

    Args:
        lora: see `LoRAMethod`. Trained per task: a LoRA of that rank and one gate per rank and
            module.
        max_kappa: the last threshold, >= 0.
        dense_iters: part of a task's steps without threshold, in [0, 1].
    Source: Lu et al., "Adaptive Rank, Reduced Forgetting", arXiv 2412.01004; the language version
        has no public code.
    """

    name = "CoDyRA"
    layer = CoDyRALinear
    max_kappa: float
    dense_iters: float

    def __init__(
        self,
        *,
        max_kappa: float = 0.005,
        dense_iters: float = 0.5,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if max_kappa < 0 or not 0 <= dense_iters <= 1:
            raise ValueError(
                f"max_kappa must be >= 0 and dense_iters in [0, 1], got {max_kappa} and "
                f"{dense_iters}"
            )
        self.max_kappa, self.dense_iters = max_kappa, dense_iters

    def kappa(self, number: int, total: int) -> float:
        """The threshold after step `number` (from 0) of `total`."""
        dense = int(self.dense_iters * total)
        if number < dense:
            return 0.0
        place = (number - dense) * GRID // (total - dense)
        return self.max_kappa * place / (GRID - 1)

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            if not len(layer.gate):
                layer.renew(self.rank, self.generator)

    def after_step(self, model: nn.Module, step: Step) -> None:
        kappa = self.kappa(step.number, step.total)
        if kappa:
            for layer in self.layers(model).values():
                layer.shrink(kappa)

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            layer.merge()

    def kept_ranks(self, model: nn.Module) -> dict[str, int]:
        """How many ranks of all finished tasks are kept, by path."""
        return {path: len(layer.frozen_A) for path, layer in self.layers(model).items()}
