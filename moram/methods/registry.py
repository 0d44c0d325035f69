"""The methods by the names that command lines use, and how to build one from plain settings."""

import difflib
import inspect
from dataclasses import fields

from ..config import MoRAMConfig
from .codyra import CoDyRA
from .ewc import EWC
from .hide_lora import HiDeLoRA
from .in_context import InContext
from .inf_lora import InfLoRA
from .joint import JointLoRA
from .lora import SequentialLoRA
from .lora_stack import LoRAStack
from .moe_adapters import MoEAdapters
from .moe_lora import MoELoRA
from .moram import MoRAM
from .o_lora import OLoRA
from .rail import RAILDual, RAILPrimal
from .task_lora import TaskLoRA
from .tree_lora import TreeLoRA
from .zero_shot import ZeroShot

METHODS = {
    "moram": MoRAM,
    "lora": SequentialLoRA,
    "o-lora": OLoRA,
    "inf-lora": InfLoRA,
    "lora-stack": LoRAStack,
    "tree-lora": TreeLoRA,
    "hide-lora": HiDeLoRA,
    "ewc": EWC,
    "moe-lora": MoELoRA,
    "moe-adapters": MoEAdapters,
    "codyra": CoDyRA,
    "rail-primal": RAILPrimal,
    "rail-dual": RAILDual,
    "task-lora": TaskLoRA,
    "joint": JointLoRA,
    "zero-shot": ZeroShot,
    "in-context": InContext,
}


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
        own = ["rank", *(field.name for field in fields(MoRAMConfig)), *own]
    return tuple(own)


def _make_moram(**arguments):
    if "rank" in arguments:
        if "atoms_per_task" in arguments:
            raise ValueError("rank and atoms_per_task are the same setting: give one of them")
        arguments["atoms_per_task"] = arguments.pop("rank")
    if "atoms_per_task" in arguments:
        arguments.setdefault("top_k", arguments["atoms_per_task"])
    names = {field.name for field in fields(MoRAMConfig)}
    settings = {k: v for k, v in arguments.items() if k in names}
    others = {k: v for k, v in arguments.items() if k not in names}
    return MoRAM(MoRAMConfig(**settings), **others)


def _closest(name, names):
    close = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
    return f" (closest: {', '.join(close)})" if close else ""
