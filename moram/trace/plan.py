"""What a run over language tasks will do: its tasks, method, scores and stages."""

import hashlib

from ..continual.scorers import scorer_for
from ..harness.plan import StreamPlan
from .model import excluded
from .report import majority_row
from .streams import is_forced, read_stream


class TracePlan(StreamPlan):
    """`StreamPlan` of `TraceSettings`.

    scorers: one a task. majority: what always giving a task's most frequent answer scores.
    """

    def read(self, log):
        settings = self.settings
        stream = read_stream(settings)
        variants = {"rouge": settings.rouge, "similarity": settings.similarity}
        self.scorers = [scorer_for(task.name, **variants) for task in stream]
        self.majority = majority_row(stream, self.scorers)
        return stream

    @property
    def fingerprint(self):
        return hashlib.sha256(repr(self.stream).encode()).hexdigest()

    @classmethod
    def arguments(cls, settings):
        return super().arguments(settings) | {"exclude": excluded(settings)}

    def check(self):
        for task, scorer in zip(self.stream, self.scorers, strict=True):
            if is_forced(self.settings, task.name) and "accuracy" not in scorer.name:
                raise ValueError(
                    f'{task.name} is scored by {scorer.variant}, which needs decoding "generate"'
                )
        super().check()

    def scored(self, number):
        whole = self.settings.full_matrix or len(self.stages) == 1
        return range(len(self.stream) if whole else number + 1)
