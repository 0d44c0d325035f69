"""The methods by the names that command lines use, and how to build one from plain settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .base import Method


class Entry(NamedTuple):
    """Where a method is found, and for what, which command lines tell without importing it.

    module: of this package. kind: its class there. needs, needs_task_id: as of the class, see
    `moram.methods.base.Method`.
    """

    module: str
    kind: str
    needs: str | None = None
    needs_task_id: bool = False


ENTRIES = {
    "moram": Entry("moram", "MoRAM"),
    "lora": Entry("lora", "SequentialLoRA"),
    "o-lora": Entry("o_lora", "OLoRA"),
    "inf-lora": Entry("inf_lora", "InfLoRA"),
    "lora-stack": Entry("lora_stack", "LoRAStack"),
    "tree-lora": Entry("tree_lora", "TreeLoRA"),
    "hide-lora": Entry("hide_lora", "HiDeLoRA"),
    "ewc": Entry("ewc", "EWC"),
    "moe-lora": Entry("moe_lora", "MoELoRA"),
    "moe-adapters": Entry("moe_adapters", "MoEAdapters", needs="clip"),
    "codyra": Entry("codyra", "CoDyRA"),
    "dac": Entry("dac", "DAC", needs="clip"),
    "lada": Entry("lada", "LADA", needs="clip"),
    "rail-primal": Entry("rail", "RAILPrimal", needs="clip"),
    "rail-dual": Entry("rail", "RAILDual", needs="clip"),
    "task-lora": Entry("task_lora", "TaskLoRA", needs_task_id=True),
    "joint": Entry("joint", "JointLoRA"),
    "zero-shot": Entry("zero_shot", "ZeroShot"),
    "in-context": Entry("in_context", "InContext", needs="language", needs_task_id=True),
}


class _Methods(Mapping[str, type["Method"]]):
    """The classes, each imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        entry = ENTRIES[name]
        return getattr(import_module(f"{__package__}.{entry.module}"), entry.kind)

    def __contains__(self, name: object) -> bool:
        return name in ENTRIES

    def __iter__(self) -> Iterator[str]:
        return iter(ENTRIES)

    def __len__(self) -> int:
        return len(ENTRIES)


METHODS = _Methods()


def make_method(name: str, **arguments: Any) -> Method:
    """A method by its name.

    Args:
        name: a key of `METHODS`. arguments: some of `accepted_arguments`.
    Raises:
        ValueError: an unknown name or argument; the message lists the closest and all accepted.
    """
    accepted = accepted_arguments(name)
    unknown = [argument for argument in arguments if argument not in accepted]
    if unknown:
        raise ValueError(
            f"{name} does not take {', '.join(unknown)}{_closest(unknown[0], accepted)}; "
            f"it takes {', '.join(accepted) or 'no arguments'}"
        )
    return METHODS[name].make(**arguments)


def accepted_arguments(name: str) -> tuple[str, ...]:
    """The names of the arguments that `make_method` takes for a method.

    Raises:
        ValueError: no method has this name.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {name!r}{_closest(name, METHODS)}"
        )
    return METHODS[name].accepted()


def _closest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (closest: {', '.join(close)})" if close else ""
