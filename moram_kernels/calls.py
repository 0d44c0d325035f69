"""What is remembered of calls of one signature: that they were checked, their plan, their launches.

A signature is all that decides about a launch: shapes, strides, dtypes, devices and alignment of
the tensors, and the settings. No tensor is kept, and no stream. What is remembered belongs to one
driver of Triton; another one begins anew. Imports no Triton.
"""

import sys
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - not in its stub

# Signatures that are remembered; then the oldest goes.
LIMIT = 512


class Course:
    """How calls run: their `Plan`, and their launches in order by kind once they are known."""

    __slots__ = ("launches", "plan")

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.launches: dict[Hashable, Sequence[Any]] = {}


class Known:
    """What calls of one signature have in common: whether they were checked, and how they run."""

    __slots__ = ("checked", "courses")

    def __init__(self) -> None:
        self.checked = False
        self.courses: dict[Hashable, Course] = {}


class _Memory:
    """Everything that is remembered, and of which state of Triton's runtime."""

    state: tuple[Any, ...] | None = None
    calls: ClassVar[dict[tuple[Any, ...], Known]] = {}


def recall(tensors: Sequence[Tensor | None], settings: Hashable) -> Known | None:
    """What is known of calls with these tensors and settings; None where nothing may be kept.

    Nothing is kept where Triton has no driver, as in its interpreter, or has launch hooks, which
    profilers set; under torch.compile and torch.func; and of what are no tensors.
    """
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack():
        return None
    try:
        driver, knobs = _runtime()
        if driver is None or _acts(knobs.launch_enter_hook) or _acts(knobs.launch_exit_hook):
            return None
        # With another state kernels are compiled otherwise.
        state = driver, knobs.add_stages_inspection_hook, knobs.debug
        if state != _Memory.state:
            forget()
            _Memory.state = state
        key = (settings, driver.get_current_device(), *_signature(tensors))
        known = _Memory.calls.get(key)
        if known is None:
            while len(_Memory.calls) >= LIMIT:
                _Memory.calls.pop(next(iter(_Memory.calls)), None)
            known = _Memory.calls[key] = Known()
        return known
    except (AttributeError, RuntimeError, StopIteration, TypeError):
        # No tensors, tensors without memory, or settings that are none: for the caller to refuse.
        # Or Triton has none of these, or another thread took the oldest call away.
        return None


def forget() -> None:
    """Forget all calls."""
    _Memory.state = None
    _Memory.calls.clear()


def _runtime() -> tuple[Any, Any]:
    """Triton's driver, if it has one already, and its settings of the runtime."""
    triton = sys.modules.get("triton")
    return (None, None) if triton is None else (triton.runtime.driver._active, triton.knobs.runtime)


def _acts(hook: Any) -> Any:
    """Whether a hook does something: a chain has a list, and what is no chain does."""
    return getattr(hook, "calls", True)


def _signature(tensors: Sequence[Tensor | None]) -> list[Any]:
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        else:
            found += (
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                tensor.device,
                tensor.data_ptr() & 15,
            )
    return found
