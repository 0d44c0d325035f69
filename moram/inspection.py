"""Which atoms fire for which task, from the operator's own weights. No files and no pictures here.

Hooks that exist only during a call read the inputs of the adapters and add up their weights; a
model that nobody looks into runs exactly as without this file.
"""

import difflib
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import mean
from typing import NamedTuple

import torch

from .config import check_count
from .inject import adapters


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
    """

    inputs: tuple[str, ...]
    tasks: tuple[str, ...]
    owners: dict
    weights: dict
    fired: dict
    num_tokens: tuple[int, ...]

    @property
    def paths(self):
        """The adapters, in the order of the model."""
        return tuple(self.weights)

    def mean_weights(self):
        """Mean mixture weight over all adapters, [inputs, N].

        Raises:
            ValueError: the adapters differ in their number of atoms.
        """
        counts = sorted({w.shape[1] for w in self.weights.values()})
        if len(counts) > 1:
            raise ValueError(f"adapters must have as many atoms for a mean, got {counts}")
        return torch.stack(list(self.weights.values())).mean(0)

    def share(self, path=None):
        """Percent of the weight by the atoms' task, [inputs, tasks]; a row in which no atom fired
        is zero."""
        if path is None:
            return torch.stack([self.share(path) for path in self.paths]).mean(0)
        weights = self.weights[path]
        by_task = weights.new_zeros(len(self.inputs), len(self.tasks))
        by_task.index_add_(1, self.owners[path], weights)
        return 100 * _normalised(by_task)

    def reuse(self, path=None):
        """Percent of the weight on atoms of tasks learned before the input's own, [inputs].

        For an input task that trained no atoms, all atoms are of earlier tasks.
        """
        return (self.share(path) * self._earlier()).sum(1)

    def even_reuse(self):
        """What `reuse` would be if all atoms weighed the same, [inputs]: to compare it with."""
        sizes = torch.tensor([total for _, total in self.num_dead()], dtype=torch.float64)
        return 100 * (sizes / sizes.sum() * self._earlier()).sum(1)

    def _earlier(self):
        order = {name: index for index, name in enumerate(self.tasks)}
        own = torch.tensor([order.get(name, len(order)) for name in self.inputs])
        return torch.arange(len(self.tasks)) < own[:, None]

    def num_fired(self, path=None):
        """Mean number of atoms that fired at a token, [inputs]."""
        if path is None:
            return torch.stack([self.num_fired(path) for path in self.paths]).mean(0)
        return self.fired[path].sum(1)

    def dead(self, path):
        """Rows in the bank of the atoms that fired at no token of any input, a tuple."""
        return tuple(self.fired[path].sum(0).eq(0).nonzero().flatten().tolist())

    def num_dead(self):
        """Dead atoms of all adapters by the task that trained them, and how many atoms it trained:
        a list of pairs."""
        dead, total = torch.zeros(2, len(self.tasks), dtype=torch.int64)
        for path in self.paths:
            owners = self.owners[path]
            dead += torch.bincount(owners[list(self.dead(path))], minlength=len(self.tasks))
            total += torch.bincount(owners, minlength=len(self.tasks))
        return list(zip(dead.tolist(), total.tolist(), strict=True))

    def separation(self, path):
        """How differently an adapter's atoms fire from input task to input task, in [0, 1].

        The total variation distance of two tasks' weights, each divided by its sum, mean over all
        pairs: 0 = the same atoms equally, 1 = no atom in common. 0 for a single task.
        """
        rows = _normalised(self.weights[path])
        pairs = [(a - b).abs().sum().item() / 2 for a, b in combinations(rows, 2)]
        return mean(pairs) if pairs else 0.0

    def by_separation(self):
        """The adapters, those that separate the input tasks best first."""
        return sorted(self.paths, key=self.separation, reverse=True)


def inspect_atoms(model, batches, tasks, *, sizes=None, last=None):
    """Run inputs of several tasks through a model and add up which atoms fire, adapter by adapter.

    The weights are those of inference, with the threshold; the model is run in eval mode and left
    as it was. Only sums are kept, never the weights of more than one call of one adapter.

    Args:
        model: a language model with MoRAM adapters; called with input_ids and attention_mask.
        batches: dict from the name of an input task to an iterable of batches, whose first two
            items are input_ids and attention_mask, both [B, T] (1 = token, 0 = padding).
        tasks: names of the tasks that trained the atoms, in order, as `moram.load` returns them.
        sizes: atoms of each of them, in order, frozen ones first; None = the config's
            atoms_per_task for each.
        last: look at the last so many tokens of each example only; None = all. Padding never
            counts.
    Returns:
        `AtomReport`.
    Raises:
        ValueError: no adapters, sizes that do not fit a bank, an input task without tokens, an
            adapter that no input reached.
    """
    found = _require_adapters(model)
    owners = _owners(found, tasks, sizes)
    if last is not None:
        check_count("last", last, 1)
    if not batches:
        raise ValueError("batches must hold at least one input task, got none")
    weights, fired = {path: [] for path in found}, {path: [] for path in found}
    num_tokens = []
    for name, part in batches.items():
        sums, count = _add_up(model, found, part, last)
        if not count:
            raise ValueError(f"input task {name!r} has no tokens to look at")
        num_tokens.append(count)
        for path, (weight, times, rows) in sums.items():
            if not rows:
                raise ValueError(
                    f"no input of {name!r} reached adapter {path}: it is not used for such "
                    "inputs, or was compiled before (inspect the model before torch.compile)"
                )
            weights[path].append(weight / rows)
            fired[path].append(times.double() / rows)
    return AtomReport(
        tuple(batches),
        tuple(tasks),
        owners,
        {path: torch.stack(rows) for path, rows in weights.items()},
        {path: torch.stack(rows) for path, rows in fired.items()},
        tuple(num_tokens),
    )


def token_atoms(model, input_ids, path, tasks, *, sizes=None, top=3):
    """The strongest atoms of one adapter at each token of a text.

    Args:
        input_ids: token ids [T]. path: of the adapter. top: atoms per token, at most.
        model, tasks, sizes: as for `inspect_atoms`.
    Returns:
        A list with a tuple of `FiredAtom`s for each token, the strongest first; empty where no
        atom fired.
    Raises:
        ValueError: see `inspect_atoms` and `find_adapter`; or there are no tokens.
    """
    check_count("top", top, 1)
    if input_ids.dim() != 1 or not len(input_ids):
        raise ValueError(f"input_ids must be [T] with T >= 1, got {tuple(input_ids.shape)}")
    found = {path: find_adapter(model, path)}
    owners = _owners(found, tasks, sizes)[path]
    seen = []

    def visit(path, adapter, x):
        seen.append(adapter.mixture_weights(x.reshape(-1, x.shape[-1])).cpu())

    with _listening(model, found, visit):
        _forward(model, input_ids[None], torch.ones_like(input_ids[None]))
    if not seen or len(seen[0]) != len(input_ids):
        got = len(seen[0]) if seen else "none"
        raise ValueError(f"adapter {path} must read {len(input_ids)} tokens, got {got}")
    view = []
    for row in seen[0]:
        order = row.argsort(descending=True, stable=True)[:top].tolist()
        view.append(
            tuple(FiredAtom(tasks[owners[i]], i, row[i].item()) for i in order if row[i] > 0)
        )
    return view


def find_adapter(model, path):
    """The MoRAM adapter at a path.

    Raises:
        ValueError: there is none; the message names the closest paths.
    """
    found = _require_adapters(model)
    if path not in found:
        close = difflib.get_close_matches(path, list(found), n=3, cutoff=0.4) or list(found)[:3]
        raise ValueError(f"there is no adapter {path!r}; closest: {', '.join(close)}")
    return found[path]


def _normalised(rows):
    """Rows divided by their sums; a row of zeros stays zero."""
    return rows / rows.sum(1, keepdim=True).clamp_min(1e-9)


def _require_adapters(model):
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters; call moram.load or moram.inject first")
    return found


def _owners(found, tasks, sizes):
    """The index of each atom's task, by path: atoms lie in the order the tasks were learned."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be one or more names, got {tasks!r}")
    if sizes is not None:
        if len(sizes) != len(tasks):
            raise ValueError(f"sizes must have one entry for each of {len(tasks)}, got {sizes}")
        for name, size in zip(tasks, sizes, strict=True):
            check_count(f"size of {name}", size, 0)
    owners = {}
    for path, adapter in found.items():
        counts = [adapter.config.atoms_per_task] * len(tasks) if sizes is None else list(sizes)
        bank = adapter.bank
        if sum(counts) != bank.num_atoms:
            raise ValueError(
                f"the atoms of {len(tasks)} tasks must add up to those of adapter {path}, "
                f"{bank.num_frozen} frozen and {bank.num_current} current, got {counts}: name "
                "all its tasks, or give sizes"
            )
        owners[path] = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))
    return owners


def _add_up(model, found, batches, last):
    """({path: [sum of weights [N], times fired [N], rows]}, tokens) of one task's batches."""
    sums = {
        path: [
            torch.zeros(adapter.bank.num_atoms, dtype=torch.float64),
            torch.zeros(adapter.bank.num_atoms, dtype=torch.int64),
            0,
        ]
        for path, adapter in found.items()
    }
    count = 0
    kept = None

    def visit(path, adapter, x):
        if x.shape[:-1] not in (kept.shape, (kept.numel(),)):
            raise ValueError(
                f"adapter {path} must read an input for each place of the mask "
                f"{tuple(kept.shape)}, got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, x.shape[-1])[kept.flatten().to(x.device)]
        weights = adapter.mixture_weights(rows)
        total = sums[path]
        total[0] += weights.sum(0).cpu()
        total[1] += (weights > 0).sum(0).cpu()
        total[2] += len(rows)

    with _listening(model, found, visit):
        for ids, mask, *_ in batches:
            if ids.dim() != 2 or mask.shape != ids.shape:
                raise ValueError(
                    "input_ids and attention_mask must both be [B, T], got "
                    f"{tuple(ids.shape)} and {tuple(mask.shape)}"
                )
            kept = _positions(mask, last)
            count += int(kept.sum())
            _forward(model, ids, mask)
    return sums, count


def _positions(mask, last):
    """Which places [B, T] are looked at: tokens, the last so many of each row or all."""
    mask = mask.bool()
    if last is None:
        return mask
    # How many tokens of the row begin here or later, wherever the padding is.
    remaining = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (remaining <= last)


def _forward(model, ids, mask):
    # The head's logits are not needed; most models can leave all but one out.
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": 1} if few else {}
    device = next(model.parameters()).device
    model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **more)


@contextmanager
def _listening(model, found, visit):
    """visit(path, adapter, x) before each adapter runs; afterwards the model is as it was."""

    def hook(adapter, args, kwargs, path):
        visit(path, adapter, args[0] if args else kwargs["x"])

    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.eval()
        for path, adapter in found.items():
            handles.append(
                adapter.register_forward_pre_hook(partial(hook, path=path), with_kwargs=True)
            )
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in modes:
            module.training = was_training
