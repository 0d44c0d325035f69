"""Finds optimisers that a new task has made useless, and says so when they take a step."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def watch(
    parameters: Callable[[], list[nn.Parameter]], change: Callable[[], object], moments: bool = True
) -> None:
    """Run change(), and let optimisers that do not fit the parameters after it say so.

    One that holds parameters which change() replaced raises at its next step if the new ones in
    their place have gradients and no optimiser holds them. One that goes on with the moments of
    parameters that change() gave new contents warns at its next step, once.

    Args:
        parameters: function that returns the trainable parameters, before and after, in one order.
        change: function without arguments. moments: whether it makes earlier moments meaningless.
    """
    before = parameters()
    change()
    after = parameters()
    kept = {id(p) for p in after}
    places = list(zip(before, after, strict=len(before) == len(after)))
    for optimizer in _holding({id(p) for p in before}):
        held = {id(p) for p in _held(optimizer)}
        successors = [new for old, new in places if id(old) in held and old is not new]
        states = {p: optimizer.state.get(p) for p in _held(optimizer) if id(p) in kept}
        states = {p: state for p, state in states.items() if state and moments}
        if successors or states:
            judge = _Judge(successors, states)
            judge.handle = optimizer.register_step_pre_hook(judge)


class _Judge:
    """Looks at an optimiser before its step."""

    def __init__(self, successors: Iterable[Tensor], states: dict[Tensor, dict[str, Any]]) -> None:
        self.successors = [weakref.ref(p) for p in successors]
        self.states = states
        self.handle: RemovableHandle | None = None

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        new = _alive(self.successors)
        learning = {key for key, p in new.items() if p.grad is not None}
        if new and not learning:
            # They wait for their first gradient.
            return
        for other in _holding(learning):
            learning -= {id(p) for p in _held(other)}
        if learning:
            raise RuntimeError(
                "optimizer must hold the atoms that moram.grow returned, got one that was built "
                "before, and none holds them: its step would not train them; build a new optimizer"
            )
        assert self.handle is not None
        self.handle.remove()
        if any(_has_moments(optimizer.state.get(p), s) for p, s in self.states.items()):
            warnings.warn(
                "optimizer must be fresh for fresh atoms, got one whose moments of an earlier "
                "task's atoms move those that moram.grow made; build a new optimizer",
                RuntimeWarning,
                stacklevel=2,
            )


def _alive(references: Iterable[weakref.ref[Tensor]]) -> dict[int, Tensor]:
    """Parameters by their id."""
    return {id(p): p for p in (reference() for reference in references) if p is not None}


def _has_moments(state: Mapping[str, Any] | None, earlier: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is still the earlier one and holds more than counts."""
    return state is earlier and any(
        isinstance(value, Tensor) and value.numel() > 1 for value in earlier.values()
    )


def _held(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _holding(wanted: set[int]) -> Iterator[Optimizer]:
    """Optimisers that hold one of the parameters with these ids.

    An optimiser leaves no trace on its parameters, so all objects are looked through. Only wrappers
    have no step hooks; what they wrap has them.
    """
    for found in gc.get_objects():
        is_optimizer = issubclass(type(found), Optimizer)
        if is_optimizer and hasattr(found, "_optimizer_step_pre_hooks"):
            held = {id(p) for p in _held(found)}
            if not held.isdisjoint(wanted):
                yield found
