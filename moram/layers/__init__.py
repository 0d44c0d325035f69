"""Modules that wrap a frozen module, most of them one Linear, and add an update to its output."""

from .base import Adapter, AdapterLinear
from .codyra import CoDyRALinear
from .lora import LoRALinear
from .moe_lora import MoELoRALinear
from .moram import MoRAMLinear
from .rank_pool import RankPoolLinear
from .stacked_lora import StackedLoRALinear

__all__ = [
    "Adapter",
    "AdapterLinear",
    "CoDyRALinear",
    "LoRALinear",
    "MoELoRALinear",
    "MoRAMLinear",
    "RankPoolLinear",
    "StackedLoRALinear",
]
