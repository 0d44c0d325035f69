"""InfLoRA: each task learns in its inputs' main directions, outside those of earlier tasks."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..layers import StackedLoRALinear
from ..sketch import Inputs
from .lora import LoRAArguments, LoRAMethod
from .train import Stage

# Of the trace: smaller eigenvalues are rounding.
TINY = 1e-6


class InfLoRA(LoRAMethod[StackedLoRALinear]):
    """A new LoRA per task beside the frozen earlier ones, all summed; A is computed, B trained.

    With C = mean x x^T over all of the task's inputs to a layer, M [k, D] the orthonormal rows that
    earlier tasks occupy there, and P = I - M^T M:

        A = the rank leading eigenvectors of P C P, of length 1 / sqrt(3)
        after task t of T:  M takes in the fewest leading eigenvectors u_i of P C P with
            tr(M C M^T) + sum_i u_i^T C u_i >= eps_t tr(C),  eps_t = epsilon + (end - epsilon) t / T

    A changes nothing for inputs within M. Of M and its complement the smaller one is kept (dual
    memory). Needs no task id. Stores one LoRA per task and the memory.

    The length is that of LoRA's initial rows, as in the authors' code. A row for which no direction
    is left is zero. That code compares sums of squared eigenvalues with eps_t and so keeps fewer
    directions; here it is the inputs' energy, as in gradient projection memory (arXiv 2103.09762).

    Args:
        lora: see `LoRAMethod`.
        epsilon, end: eps_t at the first task and towards the last, in (0, 1]; the authors use 0.95
            (CIFAR-100) or 0.98 (ImageNet-R), and 1.
    Source: Liang and Li, CVPR 2024, arXiv 2404.00228.
    Cost: two passes over a task's data, and an eigendecomposition [D, D] a layer in each.
    """

    name = "InfLoRA"
    layer = StackedLoRALinear
    epsilon: float
    end: float
    count: int

    def __init__(
        self,
        *,
        epsilon: float = 0.95,
        end: float = 1.0,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if not 0 < epsilon <= end <= 1:
            raise ValueError(f"epsilon and end must be in (0, 1], in order, got {epsilon}, {end}")
        self.epsilon, self.end = epsilon, end
        # By the first path of those that read one input.
        self.memories: dict[str, DualMemory] = {}
        self.count = 1

    def setup(self, model: nn.Module) -> None:
        super().setup(model)
        for layer in self.layers(model).values():
            layer.lora_A.requires_grad_(False)

    def stages(self, count: int) -> list[tuple[int, ...]]:
        self.count = count
        return super().stages(count)

    @torch.no_grad()
    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        layers = self.layers(model)
        inputs = Inputs(model, layers, stage.pass_over)
        down = {}
        for first, moment in inputs.moments():
            values, vectors = self._memory(first, moment).outside(moment)
            there = values[: self.rank] > TINY * moment.trace()
            down[first] = (vectors[:, : self.rank] * there).T / 3**0.5
        for path, layer in layers.items():
            if index:
                layer.grow(self.generator)
            rows = down[inputs.leader[path]].to(layer.lora_A)
            layer.lora_A = nn.Parameter(rows.clone(), requires_grad=False)

    @torch.no_grad()
    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        energy = self.epsilon + (self.end - self.epsilon) * index / self.count
        for first, moment in Inputs(model, self.layers(model), stage.pass_over).moments():
            self.memories[first] = self._memory(first, moment).with_moment(moment, energy)

    def _memory(self, path: str, moment: Tensor) -> "DualMemory":
        return self.memories.get(path) or DualMemory(moment.new_zeros(0, len(moment)), False)

    def state_dict(self) -> dict[str, Any]:
        held = {path: [m.rows, m.is_outside] for path, m in self.memories.items()}
        return super().state_dict() | {"memories": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.memories = {path: DualMemory(*parts) for path, parts in state["memories"].items()}


class DualMemory:
    """A subspace of a layer's inputs, kept as its orthonormal rows or as its complement's.

    Args:
        rows: orthonormal [k, D]. is_outside: whether they span what lies outside the subspace.
    """

    rows: Tensor
    is_outside: bool

    def __init__(self, rows: Tensor, is_outside: bool) -> None:
        self.rows, self.is_outside = rows, is_outside

    def outside(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvalues [D] of what a moment [D, D] has outside the subspace, in descending
        order, and their eigenvectors [D, D]."""
        rows = self.rows.to(moment)
        project = rows.T @ rows
        if not self.is_outside:
            project = torch.eye(len(moment)).to(moment) - project
        values, vectors = torch.linalg.eigh(project @ moment @ project)
        return values.flip(0), vectors.flip(1)

    def with_moment(self, moment: Tensor, energy: float) -> "DualMemory":
        """The subspace with the fewest more directions that make it hold that part of a moment."""
        values, vectors = self.outside(moment)
        total = moment.trace()
        held = (total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])) / total
        # Eigenvectors of eigenvalue zero may lie anywhere.
        count = min(int((held < energy).sum()), int((values > TINY * total).sum()))
        rows = self.rows.to(moment)
        rows = torch.cat([complement(rows) if self.is_outside else rows, vectors[:, :count].T])
        is_outside = 2 * len(rows) > len(moment)
        return DualMemory(complement(rows) if is_outside else rows, is_outside)


def complement(rows: Tensor) -> Tensor:
    """Orthonormal rows [D - k, D] outside those of [k, D]."""
    return torch.linalg.qr(rows.T, mode="complete").Q[:, len(rows) :].T.contiguous()
