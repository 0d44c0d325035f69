"""Finds optimisers that a new task has made useless, and says so when they take a step."""

import gc
import warnings
import weakref

import torch


def watch(parameters, change):
    """Run change(), and let optimisers that do not fit the parameters after it say so.

    One that holds parameters which change() replaced, and none of the new ones, raises at its next
    step while no other optimiser holds the new ones and they have gradients. One that goes on with
    the moments of parameters that change() gave new contents warns at its next step, once.

    Args:
        parameters: function that returns the trainable parameters, before and after.
        change: function without arguments.
    """
    before = parameters()
    change()
    after = parameters()
    kept = {id(p) for p in after}
    replaced = [p for p in before if id(p) not in kept]
    for optimizer in _holding({id(p) for p in before}):
        moments = {p: optimizer.state.get(p) for p in _held(optimizer) if id(p) in kept}
        moments = {p: state for p, state in moments.items() if state}
        judge = _Judge(after, replaced, moments)
        judge.handle = optimizer.register_step_pre_hook(judge)


class _Judge:
    """Looks at an optimiser before its step."""

    def __init__(self, current, replaced, moments):
        self.current = [weakref.ref(p) for p in current]
        self.replaced = [weakref.ref(p) for p in replaced]
        self.moments, self.handle = moments, None

    def __call__(self, optimizer, *_):
        current, replaced = _alive(self.current), _alive(self.replaced)
        held, wanted = {id(p) for p in _held(optimizer)}, set(current)
        if not held.isdisjoint(replaced) and held.isdisjoint(wanted):
            trains = any(p.grad is not None for p in current.values())
            if trains and not any(True for _ in _holding(wanted)):
                raise RuntimeError(
                    "optimizer must hold the atoms that moram.grow returned, got one that was "
                    "built before: its step would train nothing; build a new optimizer from them"
                )
            # Another optimiser trains them, or they wait for their first gradient.
            return
        self.handle.remove()
        if any(_has_moments(optimizer.state.get(p), s) for p, s in self.moments.items()):
            warnings.warn(
                "optimizer must be fresh for fresh atoms, got one whose moments of an earlier "
                "task's atoms move those that moram.grow made; build a new optimizer",
                RuntimeWarning,
                stacklevel=2,
            )


def _alive(references):
    """Parameters by their id."""
    return {id(p): p for p in (reference() for reference in references) if p is not None}


def _has_moments(state, earlier):
    """Whether a parameter's state is still the earlier one and holds more than counts."""
    return state is earlier and any(
        isinstance(value, torch.Tensor) and value.numel() > 1 for value in state.values()
    )


def _held(optimizer):
    return (p for group in optimizer.param_groups for p in group["params"])


def _holding(wanted):
    """Optimisers that hold one of the parameters with these ids.

    An optimiser leaves no trace on its parameters, so all objects are looked through. Only wrappers
    have no step hooks; what they wrap has them.
    """
    for found in gc.get_objects():
        is_optimizer = issubclass(type(found), torch.optim.Optimizer)
        if is_optimizer and hasattr(found, "_optimizer_step_pre_hooks"):
            held = {id(p) for p in _held(found)}
            if not held.isdisjoint(wanted):
                yield found
