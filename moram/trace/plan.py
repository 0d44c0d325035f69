"""What a run over language tasks will do: its tasks, method, scores and stages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..continual.data import Task
from ..continual.scorers import Scorer, scorer_for
from ..harness.plan import StreamPlan
from ..harness.settings import StreamSettings
from .model import excluded
from .report import majority_row
from .settings import TraceSettings
from .streams import is_forced, read_stream

if TYPE_CHECKING:
    from ..harness.progress import Log


class TracePlan(StreamPlan):
    """`StreamPlan` of `TraceSettings`.

    scorers: one a task. majority: what always giving a task's most frequent answer scores.
    """

    settings: TraceSettings
    stream: list[Task]
    scorers: list[Scorer]
    majority: list[float]

    def read(self, log: Log) -> list[Task]:
        settings = self.settings
        stream = read_stream(settings)
        variants = {"rouge": settings.rouge, "similarity": settings.similarity}
        self.scorers = [scorer_for(task.name, **variants) for task in stream]
        self.majority = majority_row(stream, self.scorers)
        return stream

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.stream).encode()).hexdigest()

    @classmethod
    def arguments(cls, settings: StreamSettings) -> dict[str, Any]:
        assert isinstance(settings, TraceSettings)
        return super().arguments(settings) | {"exclude": excluded(settings)}

    def check(self) -> None:
        for task, scorer in zip(self.stream, self.scorers, strict=True):
            if is_forced(self.settings, task.name) and "accuracy" not in scorer.name:
                raise ValueError(
                    f'{task.name} is scored by {scorer.variant}, which needs decoding "generate"'
                )
        super().check()

    def scored(self, number: int) -> Iterable[int]:
        whole = self.settings.full_matrix or len(self.stages) == 1
        return range(len(self.stream) if whole else number + 1)
