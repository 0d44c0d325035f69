"""What `moram inspect` reads of a run of moram trace: prompts, and answers where they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..continual import load_stream
from ..continual.data import Task, check_characters
from ..harness.inspection.run import Choice, Inputs, Looker
from .encode import Batch, Encoder, by_length, decoded
from .model import load
from .report import REPORT
from .settings import SPLITS, TraceSettings

if TYPE_CHECKING:
    from ..harness.progress import Log


class TraceLooker(Looker):
    """`Looker` of moram trace. The model reads the prompts, and where decoding is "forced" the true
    answers behind them."""

    report = REPORT
    splits = SPLITS

    def find(self, settings: TraceSettings, names: tuple[str, ...], choice: Choice) -> TraceInputs:
        splits, data = dict.fromkeys(names, choice.split), choice.data or settings.data
        return TraceInputs(settings, load_stream(data, names, splits, choice.split), choice.limit)


class TraceInputs(Inputs):
    """`Inputs` of some tasks.

    Args:
        settings: of the run. stream: the tasks. limit: at most so many examples a task, the first.
    """

    encoder: Encoder

    def __init__(self, settings: TraceSettings, stream: Sequence[Task], limit: int) -> None:
        self.settings, self.stream, self.limit = settings, stream, limit
        self.what = f"at most {limit} examples a task"

    def load(self, log: Log) -> nn.Module:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.tokenizer = load(self.settings, self.device, log)
        self.encoder = Encoder(self.tokenizer, self.settings)
        return model

    def batches(self) -> dict[str, Iterable[Batch]]:
        return {task.name: self._batches(task) for task in self.stream}

    def _batches(self, task: Task) -> Iterator[Batch]:
        """What the model reads of a task when it is scored, in batches of similar lengths."""
        examples, encoder = task.test[: self.limit], self.encoder
        if self.settings.of("decoding", task.name) == "generate":
            rows = encoder.prompts(task.name, [example.prompt for example in examples])
        else:
            rows = encoder.scored(task.name, examples)
        order, size = by_length(rows), self.settings.eval_batch
        for start in range(0, len(order), size):
            yield rows.batch(order[start : start + size])

    def read(self, text: str) -> tuple[Tensor, list[str]]:
        check_characters("text", text)
        ids = self.encoder.prompts(self.stream[0].name, [text]).ids[0] if text.strip() else []
        if not ids:
            raise ValueError(f"text must hold at least one token, got {text!r}")
        tokens = list(map(partial(decoded, self.tokenizer), ([token] for token in ids)))
        return torch.tensor(ids, device=self.device), tokens


LOOKER = TraceLooker()
