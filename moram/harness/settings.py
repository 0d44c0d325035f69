"""The settings of a run over a stream: what all benchmarks share, with its checks, in one place.

A benchmark's dataclass derives from `StreamSettings` and adds what it alone has. What a value may
be is said where the setting is declared, see `values`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ..methods.base import MODELS, Method
from ..methods.registry import ENTRIES, Entry
from ..methods.train import TrainSettings
from .describe import Presets, preset_values
from .values import (
    FRACTION,
    NOT_NEGATIVE,
    among,
    check_value,
    converted,
    default_of,
    rules_of,
    setting,
)
from .yaml_values import read_yaml

# In config.json beside the settings: what tells a run's examples from others.
EXAMPLES = "examples"


@dataclass(frozen=True)
class StreamSettings:
    """What the settings of every benchmark have. A subclass says its own defaults, and has the
    settings `tasks` (a tuple), `data` and `model` (texts), or what its `words` call them.

    The kind of a value is its annotation: str, bool, int, float, tuple (names, which may come as
    one text with commas) or dict. With "| None" it may be None, and with "| dict" a dict from task
    to value with "*" for the others.

    Args:
        method, method_args: see `moram.methods.registry`.
        label: the name that tables show, by which they group runs; empty = the method's own.
        preset: the settings that this one started from, for the record.
        targets, exclude: as in `MoRAMConfig`, for every method.
        rank: of LoRA, atoms a task of MoRAM: equal trained parameters for all methods.
        dropout: of the adapters' inputs in training.
        lr, batch_size, schedule, betas, clip, seed: see `TrainSettings`.
        eval_limit: at most so many test examples a task; None = all.
        eval_batch: test examples that go through the model at once.
        untrained: also score the untouched model.
        threads: of torch; None = torch's choice.
        quiet, tensorboard: as named. save_seconds: how often the state is written within a task.
        out: folder for everything the run writes.
    Raises:
        TypeError, ValueError: a setting is of the wrong kind or out of range; names it.
    """

    # Starting points, by name; see `moram.trace.presets`.
    presets: ClassVar[Presets] = {}
    # What this benchmark calls its "tasks", "data" and "model", where it has names of its own.
    words: ClassVar[dict[str, str]] = {}
    # Changes by which held-out training examples are scored: for choosing settings.
    choosing: ClassVar[dict[str, Any]] = {}
    # What `Method.needs` may be, where messages send other methods, and whether a method is told
    # the task that it is scored on.
    model_kind: ClassVar[str | None] = None
    elsewhere: ClassVar[str] = ""
    tells_task: ClassVar[bool] = True

    method: str = "moram"
    method_args: dict[str, Any] = field(default_factory=dict)
    label: str = setting("", free=True)
    preset: str = "paper"
    targets: str | tuple[str, ...] = "auto"
    exclude: tuple[str, ...] = ()
    rank: int = 8
    dropout: float = setting(0.0, within=FRACTION)
    lr: float = 5e-4
    batch_size: int = 32
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    seed: int = setting(0, least=0, same_row=True)
    eval_limit: int | None = None
    eval_batch: int = setting(1, free=True)
    untrained: bool = True
    threads: int | None = setting(None, free=True)
    quiet: bool = setting(False, free=True)
    tensorboard: bool = setting(False, free=True)
    save_seconds: float = setting(120.0, within=NOT_NEGATIVE, free=True)
    out: str = setting("out", given=True, free=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            self.put(item.name, converted(item, getattr(self, item.name)))
            check_value(self, item)
        among("preset", self.preset, self.presets)
        self.complete()
        word = self.word("tasks")
        if not self.stream:
            raise ValueError(f"{word} must name at least one")
        if len(set(self.stream)) != len(self.stream):
            raise ValueError(f"{word} must differ, got {', '.join(self.stream)}")
        for item in fields(self):
            for task in self.stream if isinstance(getattr(self, item.name), dict) else ():
                check_value(self, item, task)
        self.check()
        for task in self.stream:
            _ = self.train_settings(task)

    def complete(self) -> None:
        """Called when every value is of its kind: what follows from others is `put` here."""

    def check(self) -> None:
        """Called when all is complete: what several settings say together is checked here."""

    def put(self, name: str, value: Any) -> None:
        """Set a value while the settings are made."""
        object.__setattr__(self, name, value)

    @classmethod
    def word(cls, name: str) -> str:
        """What this benchmark calls its "tasks", "data" or "model"."""
        return cls.words.get(name, name)

    @property
    def stream(self) -> tuple[str, ...]:
        """The names of the tasks, in the order they are learned."""
        return getattr(self, self.word("tasks"))

    @property
    def source(self) -> str:
        """Where the data lie."""
        return getattr(self, self.word("data"))

    @property
    def base_model(self) -> str:
        """What is adapted."""
        return getattr(self, self.word("model"))

    @property
    def tied(self) -> set[str]:
        """Settings, free otherwise, that change results beside these values of the others."""
        return set()

    @classmethod
    def with_rule(cls, rule: str) -> set[str]:
        """The settings that have a rule, such as "free"."""
        return {item.name for item in fields(cls) if rules_of(cls, item.name).get(rule)}

    @classmethod
    def refusal(cls, method: Entry | type[Method]) -> str:
        """Why a method does not fit, to be read behind its name; empty where it does."""
        other = cls.other_models(method)
        if not other and method.needs_task_id and not cls.tells_task:
            return "must be told the task, which this benchmark does not do"
        return other

    @classmethod
    def other_models(cls, method: Entry | Method | type[Method]) -> str:
        """That a method is for models of another kind, as for `refusal`; empty where it is not."""
        if method.needs in (None, cls.model_kind):
            return ""
        return f"is for {MODELS[method.needs]}{cls.elsewhere}"

    @classmethod
    def methods(cls) -> list[str]:
        """The names of the methods that fit."""
        return [name for name, method in ENTRIES.items() if not cls.refusal(method)]

    def of(self, name: str, task: str) -> Any:
        """The value of a setting for a task."""
        value = getattr(self, name)
        if not isinstance(value, dict):
            return value
        if task in value:
            return value[task]
        if "*" not in value:
            raise ValueError(f'{name} has no value for {task} and no "*"')
        return value["*"]

    def train_settings(self, task: str) -> TrainSettings:
        """What `TaskTrainer` takes for a task: the settings that have the names of its own."""
        names = [item.name for item in fields(TrainSettings) if hasattr(self, item.name)]
        return TrainSettings(**{name: self.of(name, task) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def make(
        cls,
        preset: str | None = "paper",
        method: str = "moram",
        files: Iterable[str | Path] = (),
        changes: Iterable[dict[str, Any]] = (),
    ) -> Self:
        """Settings from a preset, then YAML files, then changes, the later ones winning.

        Args:
            preset: holds settings for all methods and some for single ones. None = what a file
                says, or else "paper".
            method: name of the method, unless a file or a change names another.
            files: YAML files with a flat mapping from setting to value.
            changes: dicts of settings. A key may reach into a dict: "method_args.top_k". What a
                file or a change says of method_args is added to what was there.
        Raises:
            ValueError: an unknown preset or setting; the message names the closest ones.
        """
        layers = [read_yaml(path) for path in files] + [dict(c) for c in changes]
        for layer in layers:
            # The config.json of a run says, besides its settings, which examples it had.
            layer.pop(EXAMPLES, None)
        if preset is None:
            named: str = next((own["preset"] for own in layers if "preset" in own), "paper")
            preset = named
        among("preset", preset, cls.presets)
        for layer in layers:
            if layer.get("preset", preset) != preset:
                raise ValueError(f"preset is {preset!r}, and a file asks for {layer['preset']!r}")
            method = layer.get("method", method)
        values = preset_values(cls.presets, preset, method)
        known = {item.name: item for item in fields(cls)}
        for layer in layers:
            for key, value in layer.items():
                name, _, inner = key.partition(".")
                name = cls.word(name)
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                    raise ValueError(
                        f"there is no setting {name!r}"
                        + (f"; close: {', '.join(close)}" if close else "")
                    )
                if inner:
                    before = values.get(name, default_of(known[name]))
                    before = before if isinstance(before, dict) else {"*": before}
                    value = {**before, inner: value}
                elif name == "method_args" and isinstance(value, dict):
                    # A file that sets one argument leaves the preset's others alone.
                    value = {**values.get(name, {}), **value}
                values[name] = value
        return cls(**values)
