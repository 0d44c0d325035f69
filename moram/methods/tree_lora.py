"""TreeLoRA: each module of the LoRA is pulled towards an earlier task that a bandit picks."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from ..layers import LoRALinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod
from .train import Stage

FAVOURS = ("near", "distant")


class Node(NamedTuple):
    """Tasks that a tree holds together, and how it splits them.

    tasks: their numbers. median: of their similarities, where they split; None at a leaf.
    children: two nodes, the more similar tasks first, or none.
    """

    tasks: tuple[int, ...]
    median: float | None = None
    children: tuple["Node", ...] = ()


class TreeLoRA(LoRAMethod[LoRALinear]):
    """One continuing LoRA, regularised towards earlier tasks, module by module.

    The signal g of a module is its A, flattened; G_t is its mean over the steps of task t's last
    epoch, the running mean that of the epoch so far. In a later task's step k of an epoch of N:

    1. A bandit picks an earlier task p for each module l by the distance d = |running - G_p|_1:
       score = bonus - mean d seen so far, bonus = sqrt(log(2 N (k+1) (k+2))) / sqrt(2 visits),
       the lower confidence bound of the distance with its sign turned. Shifted to >= 0; a first
       task is drawn from the softmax of the scores' sums over modules, and the scores of its
       branch at the root of the tree are raised by min(median similarity, 1.5); scaled to a range
       of 1; p_l is drawn from each module's softmax.
    2. loss += - reg (k/N) CE I / |I|,  I = sum_l <g_l, G_p_l>, where CE and |I| count as constants:
       it pulls towards the picked tasks' directions.

    Deviations: the paper speaks of gradients where its code takes A, which is also done here. The
    code's score is bonus + mean distance, which favours distant tasks, contrary to the paper:
    favour="distant" gives it. The code divides I by I itself, which pushes away where I is
    negative; it multiplies the running mean by the number of modules, divides it by all steps of
    the epoch, and needs modules of equal shape. A median similarity below 1 would lower the branch
    it should raise and counts as 1.

    Needs no task id. Stores one LoRA, and one A per earlier task.

    Args:
        lora: see `LoRAMethod`.
        reg: weight of the regulariser, >= 0.
        favour: "near" or "distant" earlier tasks, see above.
    Source: Qian et al., ICML 2025, arXiv 2506.10355.
    Cost: a few passes over A a step, one small copy to the CPU.
    """

    name = "TreeLoRA"
    layer = LoRALinear
    reg: float
    count: int
    visits: Any
    distances: Any

    def __init__(
        self,
        *,
        reg: float = 0.5,
        favour: str = "near",
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if reg < 0:
            raise ValueError(f"reg must be >= 0, got {reg}")
        if favour not in FAVOURS:
            raise ValueError(f"favour must be one of {', '.join(FAVOURS)}, got {favour!r}")
        self.reg, self.favour = reg, favour
        # G of each earlier task, a vector per module; the sum of this epoch's signals, and of how
        # many steps; visits and summed distances [earlier tasks, modules].
        self.signals: list[list[Tensor]] = []
        self.sums: list[Tensor] = []
        self.count = 0
        self.visits = self.distances = torch.zeros(0, 0, dtype=torch.float64)
        self._root: Node | None = None

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        shape = (len(self.signals), len(self.layers(model)))
        self.visits = torch.zeros(shape, dtype=torch.float64)
        self.distances = torch.zeros(shape, dtype=torch.float64)
        self.sums, self.count, self._root = [], 0, None

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        signals = [layer.lora_A.flatten() for layer in self.layers(model).values()]
        place = step.number % step.per_epoch
        if place == 0:
            self.sums, self.count = [], 0
        fresh = [signal.detach() for signal in signals]
        held = zip(self.sums, fresh, strict=True)
        self.sums = (
            [a.to(b.device) + b for a, b in held] if self.sums else [f.clone() for f in fresh]
        )
        self.count += 1
        if not self.signals:
            return None
        picks = self.pick(place, step.per_epoch)
        chosen = [
            self.signals[task][module].to(signal.device)
            for module, (task, signal) in enumerate(zip(picks, signals, strict=True))
        ]
        self._note(picks, chosen)
        inner = total(signal @ target for signal, target in zip(signals, chosen, strict=True))
        ramp = self.reg * place / step.per_epoch
        return -ramp * step.loss.detach() * inner / (inner.detach().abs() + 1e-5)

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        self.signals.append([held / self.count for held in self.sums])
        self.sums, self.count, self._root = [], 0, None

    def pick(self, place: int, per_epoch: int) -> list[int]:
        """The earlier task to regularise towards, one number a module."""
        scores = self.scores(place, per_epoch)
        scores = scores - scores.min()
        first = self._draw(scores.sum(1).softmax(0))
        if self._root is None:
            self._root = build_tree(differences(self.signals))
        for child in self._root.children:
            if first in child.tasks:
                # What has children was split at a median.
                assert self._root.median is not None
                raised = min(max(self._root.median, 1.0), 1.5)
                scores[list(child.tasks)] *= raised
        scores = scores / (scores.max() - scores.min() + 1e-5)
        return [self._draw(column) for column in scores.softmax(0).T]

    def scores(self, place: int, per_epoch: int) -> Tensor:
        """How much each earlier task is favoured for each module [tasks, modules]."""
        distance = self.distances / self.visits.clamp_min(1)
        bonus = math.sqrt(math.log(2 * per_epoch * (place + 1) * (place + 2)))
        bonus = bonus / (2 * self.visits + 1e-5).sqrt()
        return bonus - distance if self.favour == "near" else bonus + distance

    def _draw(self, probabilities: Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def _note(self, picks: list[int], chosen: Iterable[Tensor]) -> None:
        """Count the picked tasks' visits and their distances from the running mean."""
        pairs = zip(self.sums, chosen, strict=True)
        found = torch.stack([(held / self.count - g).abs().sum() for held, g in pairs])
        modules = list(range(len(picks)))
        self.visits[picks, modules] += 1
        self.distances[picks, modules] += found.to("cpu", torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "signals": [list(task) for task in self.signals],
            "sums": list(self.sums),
            "count": self.count,
            "visits": self.visits.clone(),
            "distances": self.distances.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.signals = [list(task) for task in state["signals"]]
        self.sums, self.count = list(state["sums"]), state["count"]
        self.visits, self.distances = state["visits"].clone(), state["distances"].clone()
        self._root = None


def differences(signals: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What each task added to the one before it: D_0 = G_0, D_t = G_t - G_(t-1).

    Args:
        signals: one list of vectors, one a module, per task.
    """
    # After a restart some may still lie on the CPU.
    devices = [g.device for g in signals[-1]]
    signals = [[g.to(d) for g, d in zip(task, devices, strict=True)] for task in signals]
    before = [[torch.zeros_like(g) for g in signals[0]], *signals]
    return [
        [after - g for g, after in zip(old, new, strict=True)]
        for old, new in zip(before, signals, strict=False)
    ]


def build_tree(
    steps: Sequence[Sequence[Tensor]], tasks: Iterable[int] | None = None, depth: int = 0
) -> Node:
    """Group tasks by how similar their steps are, one module deeper at each level.

    A task's similarity is the inner product of its step in module `depth` with the mean of the
    group's. The group splits at the median, tasks at or above it first; in halves where that
    separates nothing. Leaves hold one task, or are as deep as there are modules.

    Args:
        steps: [task][module] of vectors. tasks: numbers of the group; None = all.
    """
    tasks = tuple(range(len(steps))) if tasks is None else tuple(tasks)
    if len(tasks) <= 1 or depth == len(steps[0]):
        return Node(tasks)
    mean = torch.stack([steps[task][depth] for task in tasks]).mean(0)
    similar = {task: float(steps[task][depth] @ mean) for task in tasks}
    median = statistics.median(similar.values())
    near = [task for task in tasks if similar[task] >= median]
    far = [task for task in tasks if similar[task] < median]
    if not far:
        near, far = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
    children = (build_tree(steps, near, depth + 1), build_tree(steps, far, depth + 1))
    return Node(tasks, median, children)
