"""What was seen of a model's atoms, and the numbers that follow from it. Runs no model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """What happened at the places that one adapter reads, by input task and kind of place.

    num: places. fired: those at which some atom fired. update, output: sums of |update|^2 and of
    |output of the base|^2 over them. All [inputs, kinds], float64.
    """

    num: Tensor
    fired: Tensor
    update: Tensor
    output: Tensor


class FiredAtom(NamedTuple):
    """One atom at one token: the task that trained it, its row in the bank, its mixture weight."""

    task: str
    index: int
    weight: float


@dataclass(frozen=True)
class AtomReport:
    """Which atoms fired for which input task; made by `inspect_atoms`.

    Methods that take a path give the mean over all adapters where it is None.

    Args:
        inputs: names of the tasks that inputs came from.
        tasks: names of the tasks that trained the atoms, in the order they were learned.
        owners: by adapter path, the index in `tasks` of each atom's task, [N], int64.
        weights: by path, mean mixture weight [inputs, N], float64; a row sums to 1 at most.
        fired: by path, in which part of the tokens an atom fired [inputs, N], float64.
        num_tokens: how many tokens of each input task were looked at.
        kinds: names of the kinds of places, such as class token and patch.
        places: by path, `Places`.
    """

    inputs: tuple[str, ...]
    tasks: tuple[str, ...]
    owners: dict[str, Tensor]
    weights: dict[str, Tensor]
    fired: dict[str, Tensor]
    num_tokens: tuple[int, ...]
    kinds: tuple[str, ...]
    places: dict[str, Places]

    @property
    def paths(self) -> tuple[str, ...]:
        """The adapters, in the order of the model."""
        return tuple(self.weights)

    def mean_weights(self) -> Tensor:
        """Mean mixture weight over all adapters, [inputs, N].

        Raises:
            ValueError: the adapters differ in their number of atoms.
        """
        counts = sorted({w.shape[1] for w in self.weights.values()})
        if len(counts) > 1:
            raise ValueError(f"adapters must have as many atoms for a mean, got {counts}")
        return torch.stack(list(self.weights.values())).mean(0)

    def share(self, path: str | None = None) -> Tensor:
        """Percent of the weight by the atoms' task, [inputs, tasks]; a row in which no atom fired
        is zero."""
        if path is None:
            return torch.stack([self.share(path) for path in self.paths]).mean(0)
        weights = self.weights[path]
        by_task = weights.new_zeros(len(self.inputs), len(self.tasks))
        by_task.index_add_(1, self.owners[path], weights)
        return 100 * _normalised(by_task)

    def reuse(self, path: str | None = None) -> Tensor:
        """Percent of the weight on atoms of tasks learned before the input's own, [inputs].

        For an input task that trained no atoms, all atoms are of earlier tasks.
        """
        return (self.share(path) * self._earlier()).sum(1)

    def even_reuse(self) -> Tensor:
        """What `reuse` would be if all atoms weighed the same, [inputs]: to compare it with."""
        sizes = torch.tensor([total for _, total in self.num_dead()], dtype=torch.float64)
        return 100 * (sizes / sizes.sum() * self._earlier()).sum(1)

    def _earlier(self) -> Tensor:
        order = {name: index for index, name in enumerate(self.tasks)}
        own = torch.tensor([order.get(name, len(order)) for name in self.inputs])
        return torch.arange(len(self.tasks)) < own[:, None]

    def num_fired(self, path: str | None = None) -> Tensor:
        """Mean number of atoms that fired at a token, [inputs]."""
        if path is None:
            return torch.stack([self.num_fired(path) for path in self.paths]).mean(0)
        return self.fired[path].sum(1)

    def fired_places(self, paths: Iterable[str] | None = None) -> Tensor:
        """Percent of the places at which some atom fired, [inputs, kinds + 1], the last column over
        all kinds: the mean over some adapters (None = all) that read such places, nan without."""
        return 100 * self._by_kind(paths, lambda p: p.fired / p.num)

    def strength(self, paths: Iterable[str] | None = None) -> Tensor:
        """The update's root mean square in percent of the base output's, as `fired_places`."""
        return 100 * self._by_kind(paths, lambda p: (p.update / p.output.clamp_min(1e-30)).sqrt())

    def _by_kind(self, paths: Iterable[str] | None, ratio: Callable[[Places], Tensor]) -> Tensor:
        found = []
        for path in self.paths if paths is None else paths:
            columns = [torch.cat([t, t.sum(1, keepdim=True)], 1) for t in self.places[path]]
            places = Places(*columns)
            found.append(ratio(places).masked_fill(places.num == 0, math.nan))
        return torch.stack(found).nanmean(0)

    def dead(self, path: str) -> tuple[int, ...]:
        """Rows in the bank of the atoms that fired at no token of any input, a tuple."""
        return tuple(self.fired[path].sum(0).eq(0).nonzero().flatten().tolist())

    def num_dead(self) -> list[tuple[int, int]]:
        """Dead atoms of all adapters by the task that trained them, and how many atoms it trained:
        a list of pairs."""
        dead, total = torch.zeros(2, len(self.tasks), dtype=torch.int64)
        for path in self.paths:
            owners = self.owners[path]
            dead += torch.bincount(owners[list(self.dead(path))], minlength=len(self.tasks))
            total += torch.bincount(owners, minlength=len(self.tasks))
        return list(zip(dead.tolist(), total.tolist(), strict=True))

    def separation(self, path: str) -> float:
        """How differently an adapter's atoms fire from input task to input task, in [0, 1].

        The total variation distance of two tasks' weights, each divided by its sum, mean over all
        pairs: 0 = the same atoms equally, 1 = no atom in common. 0 for a single task.
        """
        rows = _normalised(self.weights[path])
        pairs = [(a - b).abs().sum().item() / 2 for a, b in combinations(rows, 2)]
        return mean(pairs) if pairs else 0.0

    def by_separation(self) -> list[str]:
        """The adapters, those that separate the input tasks best first."""
        return sorted(self.paths, key=self.separation, reverse=True)


def _normalised(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros stays zero."""
    return rows / rows.sum(1, keepdim=True).clamp_min(1e-9)
