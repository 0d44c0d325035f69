"""MoRAM: teach a pretrained model task after task, with atoms that decide for themselves."""

from .bank import AtomBank
from .checkpoint import load, save
from .config import MoRAMConfig
from .inject import adapters, eject, grow, inject, parameters
from .layers import MoRAMLinear
from .task import task

__version__ = "0.1.0"
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
