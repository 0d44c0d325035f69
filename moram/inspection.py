"""Which atoms fire for which task, from the operator's own weights. No files and no pictures here.

Hooks that exist only during a call read the inputs of the adapters and add up their weights; a
model that nobody looks into runs exactly as without this file.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .atom_report import AtomReport, FiredAtom, Places
from .config import check_count
from .inject import adapters
from .layers import MoRAMLinear

# Called with the path of an adapter, itself and its input.
Visit = Callable[[str, MoRAMLinear, Tensor], None]


class Reading(NamedTuple):
    """One call of a model that is not called as language models are.

    run: makes the call. kinds: what the places are that the adapters which it reaches read,
    int64 [B, T]: an index into the names of kinds, or -1 for a place that does not count.
    """

    run: Callable[[], object]
    kinds: Tensor


# A `Reading`, or input_ids and attention_mask, both [B, T] (1 = token, 0 = padding), and more.
Batch = Reading | Sequence[Tensor]


def inspect_atoms(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    tasks: Sequence[str],
    *,
    sizes: Sequence[int] | None = None,
    last: int | None = None,
    kinds: Sequence[str] = ("token",),
) -> AtomReport:
    """Run inputs of several tasks through a model and add up which atoms fire, adapter by adapter.

    The weights are those of inference, with the threshold; the model is run in eval mode and left
    as it was. Only sums are kept, never the weights of more than one call of one adapter.

    Args:
        model: a model with MoRAM adapters.
        batches: dict from the name of an input task to an iterable of batches. A batch is a
            `Reading`, or what a language model is called with: a sequence whose first two items
            are input_ids and attention_mask, both [B, T] (1 = token, 0 = padding).
        tasks: names of the tasks that trained the atoms, in order, as `moram.load` returns them.
        sizes: atoms of each of them, in order, frozen ones first; None = the config's
            atoms_per_task for each.
        last: look at the last so many tokens of each example only; None = all. Padding never
            counts.
        kinds: names of the kinds of places that `Reading`s tell apart.
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
    weights: dict[str, list[Tensor]] = {path: [] for path in found}
    fired: dict[str, list[Tensor]] = {path: [] for path in found}
    places: dict[str, list[Tensor]] = {path: [] for path in found}
    num_tokens = []
    for name, part in batches.items():
        sums, count = _add_up(model, found, part, last, len(kinds))
        if not count:
            raise ValueError(f"input task {name!r} has no tokens to look at")
        num_tokens.append(count)
        for path, total in sums.items():
            rows = total.places[0].sum()
            if not rows:
                raise ValueError(
                    f"no input of {name!r} reached adapter {path}: it is not used for such "
                    "inputs, or was compiled before (inspect the model before torch.compile)"
                )
            weights[path].append(total.weights / rows)
            fired[path].append(total.times / rows)
            places[path].append(total.places)
    return AtomReport(
        tuple(batches),
        tuple(tasks),
        owners,
        {path: torch.stack(rows) for path, rows in weights.items()},
        {path: torch.stack(rows) for path, rows in fired.items()},
        tuple(num_tokens),
        tuple(kinds),
        {path: Places(*torch.stack(rows, 1)) for path, rows in places.items()},
    )


def token_atoms(
    model: nn.Module,
    input_ids: Tensor,
    path: str,
    tasks: Sequence[str],
    *,
    sizes: Sequence[int] | None = None,
    top: int = 3,
) -> list[tuple[FiredAtom, ...]]:
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

    def visit(path: str, adapter: MoRAMLinear, x: Tensor) -> None:
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
            tuple(FiredAtom(tasks[int(owners[i])], i, row[i].item()) for i in order if row[i] > 0)
        )
    return view


def find_adapter(model: nn.Module, path: str) -> MoRAMLinear:
    """The MoRAM adapter at a path.

    Raises:
        ValueError: there is none; the message names the closest paths.
    """
    found = _require_adapters(model)
    if path not in found:
        close = difflib.get_close_matches(path, list(found), n=3, cutoff=0.4) or list(found)[:3]
        raise ValueError(f"there is no adapter {path!r}; closest: {', '.join(close)}")
    return found[path]


def _require_adapters(model: nn.Module) -> dict[str, MoRAMLinear]:
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters; call moram.load or moram.inject first")
    return found


def _owners(
    found: Mapping[str, MoRAMLinear], tasks: Sequence[str], sizes: Sequence[int] | None
) -> dict[str, Tensor]:
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


class _Sums:
    """What is added up of one adapter: weights [N], how often each atom fired [N], `Places` of one
    input task [4, kinds]."""

    def __init__(self, atoms: int, kinds: int) -> None:
        self.weights = torch.zeros(atoms, dtype=torch.float64)
        self.times = torch.zeros(atoms, dtype=torch.float64)
        self.places = torch.zeros(4, kinds, dtype=torch.float64)

    def add(self, adapter: MoRAMLinear, rows: Tensor, kinds: Tensor) -> None:
        """Add inputs [M, D] of an adapter at places of some kinds [M]."""
        weights, update = adapter.fire(rows)
        output = adapter.base_layer(rows)
        fired = weights > 0
        self.weights += weights.sum(0).cpu()
        self.times += fired.sum(0).cpu()
        squares = (update.double().square().sum(1), output.double().square().sum(1))
        found = torch.stack([torch.ones_like(squares[0]), fired.any(1).double(), *squares])
        self.places.index_add_(1, kinds.cpu(), found.cpu())


def _add_up(
    model: nn.Module,
    found: Mapping[str, MoRAMLinear],
    batches: Iterable[Batch],
    last: int | None,
    num_kinds: int,
) -> tuple[dict[str, _Sums], int]:
    """(sums by path, tokens) of one task's batches."""
    sums = {path: _Sums(a.bank.num_atoms, num_kinds) for path, a in found.items()}
    count = 0
    kinds: Tensor

    def visit(path: str, adapter: MoRAMLinear, x: Tensor) -> None:
        if x.shape[:-1] not in (kinds.shape, (kinds.numel(),)):
            raise ValueError(
                f"adapter {path} must read an input for each place of the mask "
                f"{tuple(kinds.shape)}, got {tuple(x.shape)}"
            )
        kept = kinds.flatten() >= 0
        rows = x.reshape(-1, x.shape[-1])[kept.to(x.device)]
        sums[path].add(adapter, rows, kinds.flatten()[kept])

    with _listening(model, found, visit):
        for batch in batches:
            reading = batch if isinstance(batch, Reading) else _reading(model, batch)
            kinds = reading.kinds.masked_fill(~_positions(reading.kinds >= 0, last), -1)
            count += int((kinds >= 0).sum())
            reading.run()
    return sums, count


def _reading(model: nn.Module, batch: Sequence[Tensor]) -> Reading:
    """The call of a language model."""
    ids, mask, *_ = batch
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise ValueError(
            "input_ids and attention_mask must both be [B, T], got "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    return Reading(partial(_forward, model, ids, mask), mask.bool().long() - 1)


def _positions(mask: Tensor, last: int | None) -> Tensor:
    """Which places [B, T] are looked at: tokens, the last so many of each row or all."""
    if last is None:
        return mask
    # How many tokens of the row begin here or later, wherever the padding is.
    remaining = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (remaining <= last)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    # The head's logits are not needed; most models can leave all but one out.
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": 1} if few else {}
    device = next(model.parameters()).device
    model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **more)


@contextmanager
def _listening(model: nn.Module, found: Mapping[str, MoRAMLinear], visit: Visit) -> Iterator[None]:
    """visit(path, adapter, x) before each adapter runs; afterwards the model is as it was."""

    def hook(
        adapter: MoRAMLinear, args: tuple[Any, ...], kwargs: dict[str, Any], path: str
    ) -> None:
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
