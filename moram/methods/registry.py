"""The methods by the names that command lines use, and how to build one from plain settings."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import NamedTuple


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
    "rail-primal": Entry("rail", "RAILPrimal", needs="clip"),
    "rail-dual": Entry("rail", "RAILDual", needs="clip"),
    "task-lora": Entry("task_lora", "TaskLoRA", needs_task_id=True),
    "joint": Entry("joint", "JointLoRA"),
    "zero-shot": Entry("zero_shot", "ZeroShot"),
    "in-context": Entry("in_context", "InContext", needs="language", needs_task_id=True),
}


class _Methods(Mapping):
    """The classes, each imported when it is asked for."""

    def __getitem__(self, name):
        entry = ENTRIES[name]
        return getattr(import_module(f"{__package__}.{entry.module}"), entry.kind)

    def __contains__(self, name):
        return name in ENTRIES

    def __iter__(self):
        return iter(ENTRIES)

    def __len__(self):
        return len(ENTRIES)


METHODS = _Methods()


def make_method(name, **arguments):
    """A method by its name.

    Args:
        name: a key of `METHODS`.
        arguments: of the method's class; see `accepted_arguments`. "moram" takes the fields of
            `MoRAMConfig` as they are, and `rank` for its atoms_per_task, as all methods on LoRA
            take it; top_k is rank unless given.
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
    return _make_moram(**arguments) if name == "moram" else METHODS[name](**arguments)


def accepted_arguments(name):
    """The names of the arguments that `make_method` takes for a method, a tuple.

    Raises:
        ValueError: no method has this name.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {name!r}{_closest(name, METHODS)}"
        )
    if METHODS[name].__init__ is object.__init__:
        return ()
    own = [p for p in inspect.signature(METHODS[name]).parameters if p != "config"]
    if name == "moram":
        from ..config import MoRAMConfig

        own = ["rank", *(field.name for field in fields(MoRAMConfig)), *own]
    return tuple(own)


def _make_moram(**arguments):
    from ..config import MoRAMConfig

    if "rank" in arguments:
        if "atoms_per_task" in arguments:
            raise ValueError("rank and atoms_per_task are the same setting: give one of them")
        arguments["atoms_per_task"] = arguments.pop("rank")
    if "atoms_per_task" in arguments:
        arguments.setdefault("top_k", arguments["atoms_per_task"])
    names = {field.name for field in fields(MoRAMConfig)}
    settings = {k: v for k, v in arguments.items() if k in names}
    others = {k: v for k, v in arguments.items() if k not in names}
    return METHODS["moram"](MoRAMConfig(**settings), **others)


def _closest(name, names):
    close = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
    return f" (closest: {', '.join(close)})" if close else ""
