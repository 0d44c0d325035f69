"""What a run will do: everything that follows from its settings and its data, without a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Sized
from typing import Any, Protocol

from ..methods.base import Method
from ..methods.registry import accepted_arguments, make_method
from ..methods.train import TrainSettings
from .progress import Log
from .settings import StreamSettings


class TaskData(Protocol):
    """One element of a stream: its name, what it is trained on and what it is scored on."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sized: ...

    @property
    def test(self) -> Sized: ...


class StreamPlan(ABC):
    """The plan of a run, which a benchmark derives from.

    settings: what it was made from. method: the method, before its `setup`. stream: the tasks, in
    the order they are learned. stages: for each stage of learning, the places in the stream whose
    training data it sees; empty = nothing is trained. has_untrained: whether the untouched model is
    scored before them; where nothing is trained, the one row of R is its. source: where the data
    lie, for messages.

    Args:
        settings: of the benchmark. log: called with lines of text.
    Raises:
        ValueError, OSError: bad data, or settings that do not fit it or the method.
    """

    settings: StreamSettings
    method: Method
    stream: Sequence[TaskData]
    stages: list[tuple[int, ...]]
    has_untrained: bool
    source: str

    def __init__(self, settings: StreamSettings, log: Log = print) -> None:
        self.settings = settings
        self.method = self.build_method(settings)
        self.stream = self.read(log)
        self.source = settings.source
        self.stages = self.method.stages(len(self.stream))
        self.has_untrained = settings.untrained and any(self.stages)
        self.check()

    @abstractmethod
    def read(self, log: Log) -> Sequence[TaskData]:
        """The tasks, cut to the limits of the settings."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What tells this run's examples from others: a run goes on with the same alone."""

    def check(self) -> None:
        """Raise ValueError unless settings and data fit together."""
        for members in self.stages:
            count = sum(len(self.stream[i].train) for i in members)
            if members and self.method.has_steps and not self.train_settings(members).steps(count):
                names = ", ".join(self.stream[i].name for i in members)
                raise ValueError(
                    f"{names}: {count} training examples are less than one batch of "
                    f"{self.settings.batch_size}"
                )

    @classmethod
    def arguments(cls, settings: StreamSettings) -> dict[str, Any]:
        """What a method is made with, where it takes it; method_args come on top."""
        names = ("targets", "exclude", "rank", "dropout", "seed")
        return {name: getattr(settings, name) for name in names}

    @classmethod
    def build_method(cls, settings: StreamSettings) -> Method:
        """The method of a run.

        Raises:
            ValueError: there is no such method or argument, or it does not fit the benchmark.
        """
        accepted = accepted_arguments(settings.method)
        common = {k: value for k, value in cls.arguments(settings).items() if k in accepted}
        method = make_method(settings.method, **(common | settings.method_args))
        # That an argument asks to be told the task is said in the results.
        refusal, as_given = settings.refusal(type(method)), ""
        if not refusal:
            refusal, as_given = settings.other_models(method), " with these method_args"
        if refusal:
            raise ValueError(f"{settings.method}{as_given} {refusal}")
        return method

    def train_settings(self, members: Sequence[int]) -> TrainSettings:
        """How a stage is trained; several tasks at once take the longest training of them."""
        candidates = [self.settings.train_settings(self.stream[i].name) for i in members]
        return max(candidates, key=lambda settings: settings.epochs)

    def examples(self, members: Sequence[int]) -> int:
        """Examples that training a stage goes through."""
        count = sum(len(self.stream[i].train) for i in members)
        if not members or not self.method.has_steps:
            return count
        settings = self.train_settings(members)
        return settings.steps(count) * settings.batch_size

    def scored(self, number: int) -> Iterable[int]:
        """The places of the tasks that are scored after a stage: all, also those to come."""
        return range(len(self.stream))

    def work(self) -> int:
        """Examples to train on and to answer, all in all."""
        tests = [len(task.test) for task in self.stream]
        answered = sum(tests[i] for t in range(len(self.stages)) for i in self.scored(t))
        untrained = sum(tests) if self.has_untrained else 0
        return sum(map(self.examples, self.stages)) + answered + untrained
