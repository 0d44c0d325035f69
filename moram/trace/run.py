"""A run over a stream of language tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import checkpoint
from ..continual.data import Task
from ..harness.run import Run, Stopped, versions
from ..methods.base import Method
from ..methods.train import Stage
from .encode import Encoder, Rows
from .model import compile_parts, fit_context, load, shard
from .plan import TracePlan
from .predict import forced, generate
from .report import REPORT
from .settings import TraceSettings
from .streams import Cached, StreamRows, is_forced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..harness.files import Results
    from ..harness.progress import Log
    from .model import LanguageModel

__all__ = ["Stopped", "TraceRun", "run_trace"]


def run_trace(
    settings: TraceSettings,
    log: Log = print,
    stop: Callable[[], bool] = lambda: False,
    cached: Cached | None = None,
) -> Results:
    """Learn the tasks one after the other and score them after each; go on where a run stopped.

    Args:
        log: called with lines of text, in the first process only.
        stop: asked after every step; if it returns true, the state is saved and `Stopped` raised.
        cached: in which runs in one process share what cache_prefix keeps.
    Returns:
        What was written to results.json.
    Raises:
        ValueError, OSError: bad settings, data, model or folder, named before any training.
        Stopped: see `stop`.
    """
    return TraceRun(settings, log, stop, cached).execute()


def answers_of(
    settings: TraceSettings, folder: str | Path, cached: Cached | None = None
) -> tuple[LanguageModel, list[list[str]], Encoder]:
    """What saved adapters answer in a fresh model.

    Args:
        settings: of the run that they are of. folder: what `moram.save` wrote.
        cached: as in `run_trace`.
    Returns:
        (the model, a list of answers a task, the run's `Encoder`).
    """
    run = _bare(settings, lambda line: None, cached)
    checkpoint.load(run.model, folder)
    run.made()
    return run.model, [run.answer(i) for i in range(len(run.stream))], run.encoder


def keep_states(settings: TraceSettings, cached: Cached, log: Log = print) -> None:
    """Add to `cached` the hidden states that a run with cache_prefix will ask for."""
    _bare(settings, log, cached).made()


def _bare(settings: TraceSettings, log: Log, cached: Cached | None) -> TraceRun:
    """A run whose model is loaded and has no adapters."""
    run = TraceRun(settings, log, cached=cached)
    run.plan = run.make_plan()
    run.method, run.stream = run.plan.method, run.plan.stream
    run.load()
    return run


class TraceRun(Run):
    """A run over language tasks.

    Args: see `run_trace` and `Run`.
    """

    report = REPORT
    settings: TraceSettings
    plan: TracePlan
    method: Method
    stream: list[Task]
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    sharded: bool
    fitted: TraceSettings
    encoder: Encoder
    rows: StreamRows

    def __init__(
        self,
        settings: TraceSettings,
        log: Log = print,
        stop: Callable[[], bool] = lambda: False,
        cached: Cached | None = None,
    ) -> None:
        from accelerate import Accelerator

        # It joins the processes that its launcher started.
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        super().__init__(settings, log, stop, accelerator.device)
        self.sharded = settings.shard or "FSDP" in str(accelerator.distributed_type)
        self.cached: Cached = {} if cached is None else cached

    def make_plan(self) -> TracePlan:
        if self.sharded and self.settings.cache_prefix:
            raise ValueError("cache_prefix and a sharded model do not go together")
        return TracePlan(self.settings, self.log)

    def load(self) -> None:
        """Load the model, and say how much of the examples it will not see."""
        self.model, self.tokenizer = load(self.settings, self.device, self.log)
        self.fitted = fit_context(self.model, self.settings, self.log)
        self.encoder = Encoder(self.tokenizer, self.fitted)
        for task in self.stream:
            prompts, answers = self.encoder.num_cut(task.name, task.train + task.test)
            self.log(
                f"{task.name}: {len(task.train)} train, {len(task.test)} "
                f"{self.settings.eval_split} examples; longer than allowed: {prompts} prompts, "
                f"{answers} answers"
            )

    def made(self) -> None:
        if self.settings.compile:
            compile_parts(self.model)
        if self.sharded:
            shard(self.model)
        self.rows = StreamRows(
            self.stream,
            self.encoder,
            self.method,
            self.model,
            self.fitted,
            any(self.plan.stages),
            self.cached,
            self.watch,
        )

    def training_model(self) -> AbstractContextManager:
        return self.rows.upper()

    def stage(self, members: Sequence[int]) -> Stage:
        """The training data of some tasks."""
        parts = [self.rows.train[i] for i in members]
        return Stage(self.model, type(parts[0]).join(parts), self.plan.train_settings(members))

    def score_task(self, number: int | str, i: int) -> dict[str, Any]:
        """Answer a task and score the answers."""
        task, scorer = self.stream[i], self.plan.scorers[i]
        texts = self.answer(i, self.progress.answered)
        prompts, labels = [e.prompt for e in task.test], [e.answer for e in task.test]
        found = {"score": scorer.function(prompts, texts, labels), "metric": scorer.variant}
        return {"eval": found, "prompts": prompts, "results": texts, "labels": labels}

    def answer(self, i: int, step: Callable[[int], object] = lambda count: None) -> list[str]:
        """The model's answers to a task; step: called with the number of examples done."""
        task, rows = self.stream[i], self.rows.test[i]
        common = (self.model, self.tokenizer)
        if not is_forced(self.settings, task.name):
            assert isinstance(rows, Rows)
            return generate(*common, rows, self.settings, task.name, self.processes, step)
        with self.rows.upper():
            return forced(*common, rows, self.settings, self.processes, step)

    def more_results(self, results: Results) -> dict[str, Any]:
        return {
            "majority": self.plan.majority,
            "metrics": [scorer.variant for scorer in self.plan.scorers],
            "decoding": [self.settings.of("decoding", task.name) for task in self.stream],
            "needs_task_id": self.method.needs_task_id,
            "processes": self.processes.world,
            "versions": versions("transformers"),
        }
