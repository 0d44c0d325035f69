"""The stream of a run: its examples, and their tokens as they are trained on and scored."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ..continual import load_stream
from ..continual.data import Task
from ..harness.progress import Bar
from ..methods.base import Method
from .encode import Batches, Encoder, Rows
from .prefix import CachedRows, Prefix
from .settings import HELD_OUT, TraceSettings

# Hidden states of the examples of a task, by what they were computed from.
Cached = dict[Hashable, list[Tensor]]


def read_stream(settings: TraceSettings) -> list[Task]:
    """The tasks of a run, cut to its limits.

    Raises:
        ValueError, OSError: see `load_stream`; or held-out examples leave nothing to train on.
    """
    held_out = settings.eval_split == HELD_OUT
    split = None if held_out else settings.eval_split
    stream = []
    for task in load_stream(settings.data, settings.tasks, settings.train_split, split):
        train, test = task.train, task.test
        if held_out:
            train, test = train[: -settings.held_out], train[-settings.held_out :]
            # A data set may hold an example twice.
            scored = set(test)
            train = tuple(example for example in train if example not in scored)
            if not train:
                raise ValueError(f"{task.name} has no more than held_out={settings.held_out} rows")
        stream.append(Task(task.name, train[: settings.train_limit], test[: settings.eval_limit]))
    return stream


class StreamRows:
    """What each task is trained on and scored on, as `Rows` or `CachedRows`.

    `upper()` is the context within which the model takes them: with cache_prefix, its upper layers
    alone.

    Args:
        method: its prompts are scored. model: in eval mode.
        trained: whether anything is trained on.
        cached: in which runs in one process share hidden states.
        watch: function from a name and a number of examples to a `Bar` over them.
    """

    settings: TraceSettings
    cached: Cached

    def __init__(
        self,
        stream: Sequence[Task],
        encoder: Encoder,
        method: Method,
        model: nn.Module,
        settings: TraceSettings,
        trained: bool,
        cached: Cached,
        watch: Callable[[str, int], Bar],
    ) -> None:
        self.settings, self.cached = settings, cached
        self.upper: Callable[[], AbstractContextManager] = nullcontext
        train = [encoder.examples(task.name, task.train) for task in stream]
        test: list[Rows] = []
        for task in stream:
            # Of several examples, the prompt of all together begins once.
            parts = encoder.without_beginnings(task)
            prompts = method.prompts(parts, lambda text: len(encoder.tokens(text)))
            prompts = [e.prompt for e in task.test] if prompts is None else prompts
            if is_forced(settings, task.name):
                pairs = [(p, e.answer) for p, e in zip(prompts, task.test, strict=True)]
                test.append(encoder.scored(task.name, pairs))
            else:
                test.append(encoder.prompts(task.name, prompts))
        self.train: Sequence[Batches] = train
        self.test: Sequence[Rows | CachedRows] = test
        if settings.cache_prefix:
            prefix = Prefix(model, settings.first_layer)
            forced = [is_forced(settings, task.name) for task in stream]
            parts = [rows for rows, wanted in zip(test, forced, strict=True) if wanted]
            self._cache(prefix, [*train, *parts] if trained else parts, watch)
            if trained:
                self.train = [self._kept(rows) for rows in train]
            pairs = zip(test, forced, strict=True)
            self.test = [self._kept(rows) if wanted else rows for rows, wanted in pairs]
            self.upper = prefix.upper

    def _cache(
        self, prefix: Prefix, parts: Iterable[Rows], watch: Callable[[str, int], Bar]
    ) -> None:
        """Keep hidden states, but those of an earlier run that are of the same tokens."""
        new = {key: rows for rows in parts if (key := self._key(rows)) not in self.cached}
        if not new:
            return
        with watch("hidden states", sum(map(len, new.values()))) as bar:
            for key, rows in new.items():
                self.cached[key] = prefix.cache(rows, self.settings.eval_batch, bar.advance)

    def _kept(self, rows: Rows) -> CachedRows:
        return CachedRows(rows, self.cached[self._key(rows)])

    def _key(self, rows: Rows) -> Hashable:
        settings = self.settings
        base = (settings.model, settings.dtype, settings.quantize, settings.first_layer)
        return (*base, tuple(map(tuple, rows.ids)))


def is_forced(settings: TraceSettings, task: str) -> bool:
    """Whether a task is scored in one pass over the true answers."""
    return settings.of("decoding", task) == "forced"
