"""Methods of continual learning, one file each, with the same hooks."""

from .base import Method
from .lora import SequentialLoRA
from .moram import MoRAM
from .stream import run_stream
from .train import TrainSettings

__all__ = ["Method", "MoRAM", "SequentialLoRA", "TrainSettings", "run_stream"]
