"""DAC: one LoRA per task as a pool of rank-1 experts, of which the most used are merged."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..config import check_count
from ..layers import RankPoolLinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod
from .train import Stage

# As published.
RANK = 12


class DAC(LoRAMethod[RankPoolLinear]):
    """A new pool of rank-1 experts per task, chosen by the batch; those used most are merged.

    `RankPoolLinear` says what a module computes. When the task ends, the `kept` experts with the
    most votes are merged and the others dropped, so that outputs change. From the second task on

        penalty = orthogonality * mean over modules of
                  1 / (m n) sum over i in P, j in C of |b_i . b_j|

    where P are the m columns of B that earlier tasks kept, and C the n = `kept` columns of this
    task with the most votes so far (activation-guided orthogonality).

    Sources of its parts: the paper's equations were read in a summary of it, the rest in the
    authors' public code. The summary's sum has no absolute value, and would have no lower bound;
    the code has it, and sums where the paper divides by m n. The first token of a text is the start
    token, as in the code: all texts of a stream vote alike, and ties go to the first experts.
    Deviations: the benchmark's loss instead of one among the texts of a batch, no weight decay
    (1e-2 there); dropout is 0 unless given (0.2 there), and alpha as given (1 there).

    Needs no task id. Stores `kept` ranks a task and module; merged into the base weights they would
    cost nothing. Trained per task: a LoRA of that rank; the router stays as it is drawn.

    Only whole batches vote as published: micro-batches vote each for itself, and so do processes.

    Args:
        lora: see `LoRAMethod`; rank is 12 by default.
        active: experts that write in a batch, at most rank; None = two thirds of it (8 of 12, as
            published).
        kept: experts merged after each task, at most rank; None = a third of it (4 of 12).
        orthogonality: weight of the penalty, >= 0.
    Source: Fa et al., "Decomposing and Composing: Towards Efficient Vision-Language Continual
        Learning via Rank-1 Expert Pool in a Single LoRA", AAAI 2026, arXiv 2601.22828.
    """

    name = "DAC"
    needs = "clip"
    layer = RankPoolLinear
    active: int
    kept: int
    orthogonality: float

    def __init__(
        self,
        *,
        active: int | None = None,
        kept: int | None = None,
        orthogonality: float = 0.1,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        lora.setdefault("rank", RANK)
        super().__init__(**lora)
        self.active = max(1, round(2 * self.rank / 3)) if active is None else active
        self.kept = max(1, round(self.rank / 3)) if kept is None else kept
        for name, value in (("active", self.active), ("kept", self.kept)):
            check_count(name, value, 1)
            if value > self.rank:
                raise ValueError(f"{name} must be at most rank={self.rank}, got {value}")
        if not 0 <= orthogonality < float("inf"):
            raise ValueError(f"orthogonality must be finite and >= 0, got {orthogonality}")
        self.orthogonality = orthogonality

    def setup(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if getattr(module, "batch_first", True) is False:
                raise ValueError(
                    f"module {path} has tensors [T, B, D], whose first tokens cannot be told; "
                    "build the model with batch_first"
                )
        super().setup(model)

    def wrap(self, linear: nn.Module, **settings: Any) -> RankPoolLinear:
        return super().wrap(linear, active=self.active, **settings)

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            if not len(layer.lora_A):
                layer.renew(self.rank, self.generator)

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        layers = self.layers(model).values()
        terms = [self._overlap(layer) for layer in layers if layer.frozen_B.shape[1]]
        if not terms or not self.orthogonality:
            return None
        return self.orthogonality * total(terms) / len(terms)

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        for layer in self.layers(model).values():
            layer.merge(self.kept)

    def _overlap(self, layer: RankPoolLinear) -> Tensor:
        """Mean of |b_i . b_j| over kept and critical current columns, a scalar."""
        critical = layer.lora_B[:, layer.most_used(self.kept)]
        return torch.mm(layer.frozen_B.T, critical).abs().mean()
