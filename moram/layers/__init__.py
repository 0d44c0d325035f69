"""Modules that wrap one frozen Linear and add an update to its output."""

from .base import AdapterLinear
from .lora import LoRALinear
from .moram import MoRAMLinear

__all__ = ["AdapterLinear", "LoRALinear", "MoRAMLinear"]
