"""Methods of continual learning, one file each, with the same hooks."""

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .base import Method
    from .codyra import CoDyRA
    from .dac import DAC
    from .ewc import EWC
    from .hide_lora import HiDeLoRA
    from .in_context import InContext
    from .inf_lora import InfLoRA
    from .joint import JointLoRA
    from .lada import LADA
    from .lora import SequentialLoRA
    from .lora_stack import LoRAStack
    from .moe_adapters import MoEAdapters
    from .moe_lora import MoELoRA
    from .moram import MoRAM
    from .o_lora import OLoRA
    from .rail import RAILDual, RAILPrimal
    from .registry import METHODS, accepted_arguments, make_method
    from .task_lora import TaskLoRA
    from .train import TrainSettings
    from .tree_lora import TreeLoRA
    from .zero_shot import ZeroShot

__all__ = [
    "DAC",
    "EWC",
    "LADA",
    "METHODS",
    "CoDyRA",
    "HiDeLoRA",
    "InContext",
    "InfLoRA",
    "JointLoRA",
    "LoRAStack",
    "Method",
    "MoEAdapters",
    "MoELoRA",
    "MoRAM",
    "OLoRA",
    "RAILDual",
    "RAILPrimal",
    "SequentialLoRA",
    "TaskLoRA",
    "TrainSettings",
    "TreeLoRA",
    "ZeroShot",
    "accepted_arguments",
    "make_method",
]

attach(
    __name__,
    {
        "base": ("Method",),
        "codyra": ("CoDyRA",),
        "dac": ("DAC",),
        "ewc": ("EWC",),
        "hide_lora": ("HiDeLoRA",),
        "in_context": ("InContext",),
        "inf_lora": ("InfLoRA",),
        "joint": ("JointLoRA",),
        "lada": ("LADA",),
        "lora": ("SequentialLoRA",),
        "lora_stack": ("LoRAStack",),
        "moe_adapters": ("MoEAdapters",),
        "moe_lora": ("MoELoRA",),
        "moram": ("MoRAM",),
        "o_lora": ("OLoRA",),
        "rail": ("RAILDual", "RAILPrimal"),
        "registry": ("METHODS", "accepted_arguments", "make_method"),
        "task_lora": ("TaskLoRA",),
        "train": ("TrainSettings",),
        "tree_lora": ("TreeLoRA",),
        "zero_shot": ("ZeroShot",),
    },
)
