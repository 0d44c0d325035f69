"""Streams of tasks, scoring and metrics: everything about tasks that does not train."""

from .data import Example, Task, load_stream
from .metrics import (
    all_average,
    average,
    backward_transfer,
    forgetting,
    last,
    majority_accuracy,
    overall_performance,
    plasticity,
    trace_backward_transfer,
    trace_forgetting,
    transfer,
)

__all__ = [
    "Example",
    "Task",
    "all_average",
    "average",
    "backward_transfer",
    "forgetting",
    "last",
    "load_stream",
    "majority_accuracy",
    "overall_performance",
    "plasticity",
    "trace_backward_transfer",
    "trace_forgetting",
    "transfer",
]
