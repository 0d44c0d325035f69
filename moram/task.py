"""Learning one task after the other, in any training loop: `moram.task`.

Protection, off by default, is this project's own addition to the published rule: after a task,
each layer remembers the directions of its inputs (`sketch.py`), and the keys of later tasks are
kept out of them. Projecting out what earlier inputs occupy is gradient projection memory's idea
(Saha et al., ICLR 2021, arXiv 2103.09762), here for keys and not for gradients.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from .guard import Fresh, guards
from .inject import adapters, grow_banks, parameters, warn_uncalled
from .inputs import Batches, Inputs, Mask
from .layers import MoRAMLinear
from .sharded import reshard, whole
from .sketch import remember


@contextmanager
def task(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    n: int | None = None,
    mask: Mask | None = None,
    protect: Literal[False] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[nn.Parameter]]:
    """Learn one task inside the with block, whatever the loop there does.

        for batches in tasks:
            with moram.task(model, batches) as atoms:
                optimizer = torch.optim.AdamW(atoms, lr=3e-3)
                for batch in batches:
                    ...

    Entering gives the atoms of the task: those that `inject` made, and from the second task on
    fresh ones, after the earlier are frozen. Leaving ends the task. An exception inside leaves it
    open: entering again goes on with its atoms.

    With `MoRAMConfig(protect=...)` (this project's addition) the batches are passed over when the
    task begins and when it ends. With U [k, D] the leading directions of the inputs of all earlier
    tasks, new keys K act as g (K - K U^T U), in training too: new atoms are blind to what lies in
    the protected directions, whatever the optimiser does. The gain g makes the root mean square of
    their first scores on the new inputs `protect_strength` times that of the frozen atoms'. Of
    what earlier inputs have outside U, new atoms see as much as new inputs have there: how much of
    the earlier outputs remains is an empirical matter, not a guarantee. No inputs are kept, and no
    task id is needed. Where several processes learn together, each passes over its own batches,
    and the moments are summed.

    Args:
        model: a model after `inject`, wrapped or not.
        batches: the task's inputs, needed with protect alone. An iterable that can be passed over
            again, of what the model is called with (dicts as keywords, tuples and lists as
            arguments, or tensors), or a function without arguments that runs the model.
        n: fresh atoms per projection; by default what the config says.
        mask: function from a batch to the places that count, bool [B, T]. By default those of the
            attention_mask that the model is called with; all, where there is none.
        protect: False goes on without protection; None is what the config says.
        generator: for the new keys.
    Returns:
        A context manager that gives the list of the parameters to train.
    Raises:
        TypeError: batches are missing, or one pass consumes them.
        ValueError: the model has no adapters; batches are empty, hold padding alone or do not reach
            an adapter; protect is set, and what earlier tasks' inputs looked like is not known.
    """
    if protect not in (None, False):
        raise ValueError(f"protect must be None or False, got {protect!r}; set it in MoRAMConfig")
    yield begin_task(model, batches, n=n, mask=mask, protect=protect, generator=generator)
    end_task(model, batches, mask=mask, protect=protect)


def begin_task(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    n: int | None = None,
    mask: Mask | None = None,
    protect: Literal[False] | None = None,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """What entering `task` does; returns the parameters to train.

    Args, Raises: see `task`.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters; call moram.inject(model, config) first")
    reshard(model)
    guarded = _guarded(found, protect)
    is_open = any(adapter.bank.guard is not None for adapter in found.values())
    inputs = None
    if guarded and not is_open:
        _check_sketches(guarded)
        inputs = _inputs(model, guarded, batches, mask)
    finished = {path: adapter for path, adapter in found.items() if adapter.bank.learned}
    if finished:
        warn_uncalled(model)
        grow_banks(model, finished, n, generator)
    if inputs is not None:
        _guard(guarded, inputs)
    return parameters(model)


def end_task(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    mask: Mask | None = None,
    protect: Literal[False] | None = None,
) -> None:
    """What leaving `task` does.

    Args, Raises: see `task`.
    """
    reshard(model)
    found = adapters(model)
    for adapter in found.values():
        if adapter.bank.guard is not None:
            adapter.bank.fold_keys()
    guarded = _guarded(found, protect)
    if guarded:
        _remember(guarded, _inputs(model, guarded, batches, mask))
    for path, adapter in found.items():
        adapter.bank.learned = True
        if path not in guarded:
            # What this task's inputs look like is not known.
            adapter.bank.sketch = None
    warn_uncalled(model)


def _guarded(
    found: Mapping[str, MoRAMLinear], protect: Literal[False] | None
) -> dict[str, MoRAMLinear]:
    """The adapters whose config asks for protection."""
    if protect is False:
        return {}
    return {path: a for path, a in found.items() if a.config.protect is not None}


def _inputs(
    model: nn.Module, found: Mapping[str, MoRAMLinear], batches: Batches | None, mask: Mask | None
) -> Inputs:
    examples = next(iter(found.values())).config.protect_examples
    return Inputs(model, found, batches, mask, examples)


def _check_sketches(found: Mapping[str, MoRAMLinear]) -> None:
    for path, adapter in found.items():
        bank = adapter.bank
        if bank.sketch is None and (bank.num_frozen or bank.learned):
            raise ValueError(
                f"protect must know the inputs of all earlier tasks, got none for {path}: they "
                "were learned without protect, or saved with sketches=False; to go on without "
                "protection, use moram.task(model, batches, protect=False)"
            )


def _guard(found: Mapping[str, MoRAMLinear], inputs: Inputs) -> None:
    """Keep the new keys of banks that have sketches out of their directions from now on."""
    fresh = {}
    for path, adapter in found.items():
        bank, config = adapter.bank, adapter.config
        if bank.sketch is not None and config.protect is not None:
            rows, frozen = whole(bank.current_keys), bank.segments()[0]
            settings = (config.protect, config.protect_strength)
            fresh[path] = Fresh(rows, frozen, bank.sketch, *settings)
    # Not before the last pass: guarded keys change what deeper layers see.
    for path, guard in guards(fresh, inputs).items():
        found[path].bank.guard_keys(*guard)


@torch.no_grad()
def _remember(found: Mapping[str, MoRAMLinear], inputs: Inputs) -> None:
    """Add the moments of a task's inputs to the sketches."""
    size = next(iter(found.values())).config.protect_size
    old = {path: a.bank.sketch for path, a in found.items() if a.bank.sketch is not None}
    for path, sketch in remember(old, inputs, size).items():
        found[path].bank.sketch = sketch
