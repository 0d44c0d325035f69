"""MoRAM: teach a pretrained model task after task, with atoms that decide for themselves."""

from typing import TYPE_CHECKING

from ._version import __version__ as __version__
from .lazy import attach

if TYPE_CHECKING:
    from .bank import AtomBank
    from .checkpoint import load, save
    from .config import MoRAMConfig
    from .inject import adapters, eject, grow, inject, parameters
    from .layers import MoRAMLinear
    from .task import task

__all__ = [
    "AtomBank",
    "MoRAMConfig",
    "MoRAMLinear",
    "adapters",
    "eject",
    "grow",
    "inject",
    "load",
    "parameters",
    "save",
    "task",
]

attach(
    __name__,
    {
        "bank": ("AtomBank",),
        "checkpoint": ("load", "save"),
        "config": ("MoRAMConfig",),
        "inject": ("adapters", "eject", "grow", "inject", "parameters"),
        "layers": ("MoRAMLinear",),
        "task": ("task",),
    },
)
