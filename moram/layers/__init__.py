"""Modules that wrap one frozen Linear and add an update to its output."""

from .base import AdapterLinear
from .codyra import CoDyRALinear
from .lora import LoRALinear
from .moe_lora import MoELoRALinear
from .moram import MoRAMLinear
from .stacked_lora import StackedLoRALinear

__all__ = [
    "AdapterLinear",
    "CoDyRALinear",
    "LoRALinear",
    "MoELoRALinear",
    "MoRAMLinear",
    "StackedLoRALinear",
]
