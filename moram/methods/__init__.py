"""Methods of continual learning, one file each, with the same hooks."""

from .base import Method, TrainSettings, run_stream
from .lora import SequentialLoRA
from .moram import MoRAM

__all__ = ["Method", "MoRAM", "SequentialLoRA", "TrainSettings", "run_stream"]
