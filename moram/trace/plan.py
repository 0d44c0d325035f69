"""What a run will do: its tasks, method, scores and stages, checked without a model."""

import hashlib

from ..continual.scorers import scorer_for
from ..methods.registry import accepted_arguments, make_method
from .model import excluded
from .report import majority_row
from .streams import is_forced, read_stream


class Plan:
    """Everything about a run that follows from its settings and its data.

    Args:
        settings: `TraceSettings`.
    Raises:
        ValueError, OSError: bad data, or settings that do not fit it or the method.
    """

    def __init__(self, settings):
        self.settings = settings
        self.stream = read_stream(settings)
        common = {"targets": settings.targets, "exclude": excluded(settings)}
        common |= {"rank": settings.rank, "dropout": settings.dropout, "seed": settings.seed}
        accepted = accepted_arguments(settings.method)
        common = {name: value for name, value in common.items() if name in accepted}
        self.method = make_method(settings.method, **(common | settings.method_args))
        if self.method.needs == "clip":
            raise ValueError(f"{settings.method} is for CLIP models; see moram xtail")
        variants = {"rouge": settings.rouge, "similarity": settings.similarity}
        self.scorers = [scorer_for(task.name, **variants) for task in self.stream]
        self.majority = majority_row(self.stream, self.scorers)
        self.source = settings.data
        # What tells this run's examples from others.
        self.fingerprint = hashlib.sha256(repr(self.stream).encode()).hexdigest()
        self.stages = self.method.stages(len(self.stream))
        # Where nothing is trained, the one row of R is the untrained model's.
        self.has_untrained = settings.untrained and any(self.stages)
        for task, scorer in zip(self.stream, self.scorers, strict=True):
            if is_forced(settings, task.name) and "accuracy" not in scorer.name:
                raise ValueError(
                    f'{task.name} is scored by {scorer.variant}, which needs decoding "generate"'
                )
        for members in self.stages:
            count = sum(len(self.stream[i].train) for i in members)
            if members and not self.train_settings(members).steps(count):
                names = ", ".join(self.stream[i].name for i in members)
                raise ValueError(
                    f"{names}: {count} training examples are less than one batch of "
                    f"{settings.batch_size}"
                )

    def train_settings(self, members):
        """`TrainSettings` of a stage; several tasks at once take the longest training of them."""
        candidates = [self.settings.train_settings(self.stream[i].name) for i in members]
        return max(candidates, key=lambda s: s.epochs)

    def examples(self, members):
        """Examples that training a stage goes through."""
        if not members:
            return 0
        settings = self.train_settings(members)
        count = sum(len(self.stream[i].train) for i in members)
        return settings.steps(count) * settings.batch_size

    def scored(self, number):
        """The tasks that are scored after a stage."""
        whole = self.settings.full_matrix or len(self.stages) == 1
        return range(len(self.stream) if whole else number + 1)

    def work(self):
        """Examples to train on and to answer, all in all."""
        tests = [len(task.test) for task in self.stream]
        answered = sum(tests[i] for t in range(len(self.stages)) for i in self.scored(t))
        untrained = sum(tests) if self.has_untrained else 0
        return sum(map(self.examples, self.stages)) + answered + untrained
