"""The stream of a run: its examples, and their tokens as they are trained on and scored."""

from contextlib import nullcontext

from ..continual import load_stream
from ..continual.data import Task
from .prefix import CachedRows, Prefix
from .settings import HELD_OUT


def read_stream(settings):
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
        stream: list of `Task`. encoder: `Encoder`. method: `Method`, whose prompts are scored.
        model: the model, in eval mode. settings: `TraceSettings`.
        trained: whether anything is trained on.
        cached: dict in which runs in one process share hidden states.
    """

    def __init__(self, stream, encoder, method, model, settings, trained, cached):
        self.settings, self.cached, self.upper = settings, cached, nullcontext
        self.train = [encoder.examples(task.name, task.train) for task in stream]
        self.test = []
        for task in stream:
            # Of several examples, the prompt of all together begins once.
            parts = encoder.without_beginnings(task)
            prompts = method.prompts(parts, lambda text: len(encoder.tokens(text)))
            prompts = [e.prompt for e in task.test] if prompts is None else prompts
            if is_forced(settings, task.name):
                pairs = [(p, e.answer) for p, e in zip(prompts, task.test, strict=True)]
                self.test.append(encoder.scored(task.name, pairs))
            else:
                self.test.append(encoder.prompts(task.name, prompts))
        if settings.cache_prefix:
            prefix = Prefix(model, settings.first_layer)
            if trained:
                self.train = [self._cache(prefix, rows) for rows in self.train]
            self.test = [
                self._cache(prefix, rows) if is_forced(settings, task.name) else rows
                for task, rows in zip(stream, self.test, strict=True)
            ]
            self.upper = prefix.upper

    def _cache(self, prefix, rows):
        """`CachedRows`, those of an earlier run where they are of the same tokens."""
        settings = self.settings
        base = (settings.model, settings.dtype, settings.quantize)
        key = (*base, prefix.first, tuple(map(tuple, rows.ids)))
        if key not in self.cached:
            self.cached[key] = prefix.cache(rows, settings.eval_batch)
        return CachedRows(rows, self.cached[key])


def is_forced(settings, task):
    """Whether a task is scored in one pass over the true answers."""
    return settings.of("decoding", task) == "forced"
