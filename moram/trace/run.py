"""A run over a stream of language tasks."""

from types import SimpleNamespace

import torch

from .. import checkpoint
from ..harness.run import Run, Stopped, versions
from ..methods.train import Stage
from .encode import Encoder
from .model import compile_parts, fit_context, load, shard
from .plan import TracePlan
from .predict import forced, generate
from .report import REPORT
from .streams import StreamRows, is_forced

__all__ = ["Stopped", "TraceRun", "run_trace"]


def run_trace(settings, log=print, stop=lambda: False, cached=None):
    """Learn the tasks one after the other and score them after each; go on where a run stopped.

    Args:
        settings: `TraceSettings`.
        log: called with lines of text, in the first process only.
        stop: asked after every step; if it returns true, the state is saved and `Stopped` raised.
        cached: a dict in which runs in one process share what cache_prefix keeps.
    Returns:
        What was written to results.json.
    Raises:
        ValueError, OSError: bad settings, data, model or folder, named before any training.
        Stopped: see `stop`.
    """
    return TraceRun(settings, log, stop, cached).execute()


def answers_of(settings, folder, cached=None):
    """What saved adapters answer in a fresh model.

    Args:
        settings: `TraceSettings` of the run that they are of. folder: what `moram.save` wrote.
        cached: as in `run_trace`.
    Returns:
        (the model, a list of answers a task, the run's `Encoder`).
    """
    run = _bare(settings, lambda line: None, cached)
    checkpoint.load(run.model, folder)
    run.made()
    run.progress = SimpleNamespace(answered=lambda count: None)
    return run.model, [run.answer(i) for i in range(len(run.stream))], run.encoder


def keep_states(settings, cached, log=print):
    """Add to `cached` the hidden states that a run with cache_prefix will ask for."""
    _bare(settings, log, cached).made()


def _bare(settings, log, cached):
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

    def __init__(self, settings, log=print, stop=lambda: False, cached=None):
        from accelerate import Accelerator

        # It joins the processes that its launcher started.
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        super().__init__(settings, log, stop, accelerator.device)
        self.sharded = settings.shard or "FSDP" in str(accelerator.distributed_type)
        self.cached = {} if cached is None else cached

    def make_plan(self):
        if self.sharded and self.settings.cache_prefix:
            raise ValueError("cache_prefix and a sharded model do not go together")
        return TracePlan(self.settings, self.log)

    def load(self):
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

    def made(self):
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

    def training_model(self):
        return self.rows.upper()

    def stage(self, members):
        """The training data of some tasks."""
        parts = [self.rows.train[i] for i in members]
        return Stage(self.model, type(parts[0]).join(parts), self.plan.train_settings(members))

    def score_task(self, number, i):
        """Answer a task and score the answers."""
        task, scorer = self.stream[i], self.plan.scorers[i]
        texts = self.answer(i)
        prompts, labels = [e.prompt for e in task.test], [e.answer for e in task.test]
        found = {"score": scorer.function(prompts, texts, labels), "metric": scorer.variant}
        return {"eval": found, "prompts": prompts, "results": texts, "labels": labels}

    def answer(self, i):
        """The model's answers to a task."""
        task, step = self.stream[i], self.progress.answered
        common = (self.model, self.tokenizer, self.rows.test[i], self.settings)
        if not is_forced(self.settings, task.name):
            return generate(*common, task.name, self.processes, step)
        with self.rows.upper():
            return forced(*common, self.processes, step)

    def more_results(self, results):
        return {
            "majority": self.plan.majority,
            "metrics": [scorer.variant for scorer in self.plan.scorers],
            "decoding": [self.settings.of("decoding", task.name) for task in self.stream],
            "needs_task_id": self.method.needs_task_id,
            "processes": self.processes.world,
            "versions": versions("transformers"),
        }
