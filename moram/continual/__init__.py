"""Streams of tasks, scoring and metrics: everything about tasks that does not train."""

from .data import Example, Task, load_stream
from .metrics import (
    backward_transfer,
    forgetting,
    majority_accuracy,
    overall_performance,
    plasticity,
)

__all__ = [
    "Example",
    "Task",
    "backward_transfer",
    "forgetting",
    "load_stream",
    "majority_accuracy",
    "overall_performance",
    "plasticity",
]
