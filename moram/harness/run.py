"""A run over a stream of tasks: train, score, write, and go on after a stop at any point.

What the tasks are made of, and how they are scored, is a subclass's business.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import checkpoint
from ..inject import adapters, warn_uncalled
from ..layers import Adapter
from ..methods.base import Method
from ..methods.train import Stage, TaskTrainer
from ..processes import Processes
from .compare import differences
from .files import Results, check_space, read_json, read_state, write_json, write_state
from .memory import peak_mib, pick_device, reset_peak
from .plan import StreamPlan, TaskData
from .progress import STEPS, Bar, Log, Progress
from .report import Report
from .settings import EXAMPLES, StreamSettings

STATE, CONFIG, RESULTS = "state.pt", "config.json", "results.json"
# What a run writes besides JSON: a folder that holds one of them without CONFIG is not its own.
OWN = (STATE, STEPS, "predictions", "adapters", "table.md", "table.csv", "table.tex", "matrix.png")
UNTRAINED = "untrained"


class Stopped(Exception):
    """The run was asked to stop, and saved what it had."""


class Run(ABC):
    """One run. What can be wrong is found by `check` and `prepare`, before any training.

    A benchmark gives the abstract methods, and overrides what else differs: `made`,
    `training_model`, `more_results`. report: its `Report`. plan: its `StreamPlan`, from `check` on.
    model: what learns, from `load` on.

    Args:
        settings: of the benchmark. log: called with lines of text, in the first process only.
        stop: asked after every step; if it returns true, the state is saved and `Stopped` raised.
        device: a torch device; None = `pick_device`. processes: None = this one alone.
    """

    report: ClassVar[Report]
    plan: StreamPlan
    model: nn.Module
    settings: StreamSettings
    stop: Callable[[], bool]
    device: torch.device
    log: Log
    method: Method
    stream: Sequence[TaskData]
    adapters: dict[str, Adapter]
    progress: Progress

    def __init__(
        self,
        settings: StreamSettings,
        log: Log = print,
        stop: Callable[[], bool] = lambda: False,
        device: torch.device | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.settings, self.stop = settings, stop
        self.processes = Processes() if processes is None else processes
        self.device = pick_device() if device is None else device
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        quiet = settings.quiet or not self.processes.is_first
        self.log = (lambda line: None) if quiet else log
        self.out = Path(settings.out)
        self.costs: list[dict[str, float]] = []

    @abstractmethod
    def make_plan(self) -> StreamPlan:
        """The plan of these settings."""

    @abstractmethod
    def load(self) -> None:
        """Set `model`, on the device and in eval mode."""

    @abstractmethod
    def stage(self, members: Sequence[int]) -> Stage:
        """The training data of some tasks, by their places in the stream."""

    @abstractmethod
    def score_task(self, number: int | str, i: int) -> dict[str, Any]:
        """Answer and score task i after a stage, or UNTRAINED; tells `progress.answered`.

        Returns:
            What is kept: plain types, with {"eval": {"score": percent}} in them.
        """

    def made(self) -> None:  # noqa: B027
        """Called when the adapters are in the model."""

    def training_model(self) -> AbstractContextManager:
        """The context in which the model is trained, where it is not the one that is scored."""
        return nullcontext()

    def more_results(self, results: Results) -> dict[str, Any]:
        """What results.json holds besides what every run writes."""
        return {}

    def execute(self) -> Results:
        """Run to the end; returns what was written to results.json."""
        self.check()
        done = read_json(self.out / RESULTS)
        if done is not None and done["complete"]:
            self.log(f"{self.out} holds the finished run")
            return done
        self.prepare()
        # Methods know adapters by their paths in the model as it is trained.
        with self.training_model():
            self.restore()
        if self.plan.has_untrained:
            self.score(UNTRAINED, range(len(self.stream)))
        for number, members in enumerate(self.plan.stages):
            with self.training_model():
                self.learn(number, members)
            self.score(number, self.plan.scored(number))
            self.write(number)
        if self.processes.is_first and adapters(self.model):
            names, base = [task.name for task in self.stream], self.settings.base_model
            checkpoint.save(self.model, self.out / "adapters", tasks=names, base_model=base)
        results = self.write(len(self.plan.stages) - 1, complete=True)
        self.progress.close()
        self.processes.wait()
        return results

    def check(self) -> None:
        """Check all that needs no model."""
        self.plan = self.make_plan()
        self.method, self.stream = self.plan.method, self.plan.stream
        # For the picture at the end: better missed now than then.
        import matplotlib  # noqa: F401

        self.open_folder()

    def prepare(self) -> None:
        """Load the model, and make everything ready to train."""
        self.load()
        self.method.setup(self.model)
        check_space(self.out, self.method.written_bytes(self.model, len(self.stream)))
        # By their paths in the whole model, whichever part of it runs later.
        self.adapters = adapters(self.model, Adapter)
        self.made()
        work = self.plan.work()
        self.progress = Progress(work, self.settings, self.out, self.processes, self.log)
        saved, fingerprint = read_json(self.out / CONFIG) or {}, self.plan.fingerprint
        if saved.get(EXAMPLES, fingerprint) != fingerprint:
            raise ValueError(f"the examples in {self.plan.source} changed since {self.out} began")
        # Last, so that a folder whose run could not begin is free for a corrected command.
        if self.processes.is_first:
            write_json(self.out / CONFIG, {**self.settings.to_dict(), EXAMPLES: fingerprint})
        self.processes.wait()

    def watch(self, name: str, total: int) -> Bar:
        """A `Bar` over what is prepared before the run's own bar begins."""
        return Bar(total, name, self.settings, self.processes, self.log)

    def open_folder(self) -> None:
        """Make the folder, or check that what it holds is of this very run."""
        self.out.mkdir(parents=True, exist_ok=True)
        saved = read_json(self.out / CONFIG)
        foreign = any(self.out.glob("*.json")) or any((self.out / name).exists() for name in OWN)
        if (saved is None and foreign) or not isinstance(saved, dict | None):
            raise ValueError(f"{self.out} holds files of something else: name another out folder")
        held = {name: value for name, value in (saved or {}).items() if name != EXAMPLES}
        changed = differences(self.settings, held, self.method.tied) if saved else []
        if changed:
            raise ValueError(
                f"{self.out} holds a run with other settings; name another out folder, or go back "
                f"to its settings: {'; '.join(changed)}"
            )
        self.processes.wait()

    def restore(self) -> None:
        """Take over the state of an earlier run, if there is one."""
        state = read_state(self.out / STATE)
        self.state = {"stage": -1, "finished": True} if state is None else state
        self.costs = self.state.get("costs", [])
        if state is None:
            if any(self.out.glob("predictions/results-[0-9]*")):
                raise ValueError(
                    f"{self.out} holds answers of trained models, but its {STATE} is gone: name "
                    "another out folder"
                )
            return
        for path, tensors in state["adapters"].items():
            self.adapters[path].load_adapter_state(tensors)
        self.method.load_state_dict(state["method"])
        self.log(f"going on: stage {state['stage'] + 1} of {len(self.plan.stages)}")

    def learn(self, number: int, members: Sequence[int]) -> None:
        """Train one stage, or what is left of it."""
        state = self.state
        if number < state["stage"] or (number == state["stage"] and state["finished"]):
            self.progress.answered(self.plan.examples(members))
            return
        fresh = number > state["stage"]
        if fresh:
            self.costs.append({"seconds": 0.0, "peak_mib": 0.0, "trained": 0})
        if members:
            stage = self.stage(members)
            reset_peak(self.device)
            self.saved = self.noted = time.perf_counter()
            if fresh:
                self.method.begin_task(self.model, number, stage)
            if self.method.has_steps:
                self.take_steps(number, stage, None if fresh else state["trainer"])
            else:
                self.progress.answered(self.plan.examples(members))
            self.method.end_task(self.model, number, stage)
            self.note_costs()
        self.state = {"stage": number, "finished": True}
        self.save()

    def take_steps(self, number: int, stage: Stage, saved: dict[str, Any] | None) -> None:
        """Train on a stage's data, from the start or from where the saved trainer stood."""
        trainer = TaskTrainer(
            self.model,
            self.method,
            stage.data,
            stage.settings,
            number,
            self.processes,
            stage.objective,
        )
        self.costs[-1]["trained"] = sum(p.numel() for p in trainer.parameters)
        if saved is not None:
            trainer.load_state_dict(saved)
        self.progress.start_stage(number, trainer.done)
        began = trainer.done
        trainer.run(self.after_step)
        self.progress.end_stage()
        if trainer.done > began:
            warn_uncalled(self.model)

    def after_step(self, trainer: TaskTrainer, loss: float) -> None:
        """Log, and save now and then, or when asked to stop."""
        self.progress.step(trainer, loss)
        stop = self.asked_to_stop()
        due = time.perf_counter() - self.saved > self.settings.save_seconds
        if stop or due:
            self.note_costs()
            self.state = {"stage": trainer.index, "finished": False}
            self.state["trainer"] = trainer.state_dict()
            self.save()
        if stop:
            raise Stopped(
                f"stopped in task {trainer.index + 1}, step {trainer.done}; the same "
                "command goes on from here"
            )

    def asked_to_stop(self) -> bool:
        """Whether the first process was asked to stop: all of them stop together."""
        return self.processes.broadcast(self.stop())

    def note_costs(self) -> None:
        """Add up what this stage has cost since the last note."""
        now = time.perf_counter()
        self.costs[-1]["seconds"] += now - self.noted
        self.costs[-1]["peak_mib"] = max(self.costs[-1]["peak_mib"], peak_mib(self.device))
        self.noted = now

    def save(self) -> None:
        """Write the state: everything a run needs to go on."""
        self.saved = time.perf_counter()
        if not self.processes.is_first:
            return
        self.costs[-1]["stored_bytes"] = self.method.stored_bytes(self.model)
        write_state(
            self.out / STATE,
            self.state
            | {
                "adapters": {path: a.adapter_state() for path, a in self.adapters.items()},
                "method": self.method.state_dict(),
                "costs": self.costs,
            },
        )

    def score(self, number: int | str, members: Iterable[int]) -> None:
        """Answer and score some tasks, each once and for all."""
        for i in members:
            path = self.prediction(number, i)
            if self.processes.broadcast(path.is_file()):
                self.progress.answered(len(self.stream[i].test))
                continue
            trained = (self.state["stage"], self.state["finished"])
            if trained != ((-1, True) if number == UNTRAINED else (number, True)):
                raise ValueError(f"{path} is gone, and so is the model that gave these answers")
            if self.asked_to_stop():
                raise Stopped("stopped between two tasks; the same command goes on from here")
            if number != UNTRAINED:
                self.method.select(self.model, i)
            found = self.score_task(number, i)
            if self.processes.is_first:
                write_json(path, found)
            self.processes.wait()

    def prediction(self, number: int | str, i: int) -> Path:
        """Where the answers of a stage to a task are kept."""
        return self.out / "predictions" / f"results-{number}-{i}-{self.stream[i].name}.json"

    def scores(self, number: int | str) -> list[float | None]:
        """A row of R: a score for each task, None where there is none."""
        found = [read_json(self.prediction(number, i)) for i in range(len(self.stream))]
        return [None if f is None else f["eval"]["score"] for f in found]

    def write(self, number: int, complete: bool = False) -> Results:
        """Write results.json and, at the end, the tables and the picture."""
        settings = self.settings
        results = {
            "format": self.report.format,
            "complete": complete,
            "method": settings.method,
            "name": settings.label or self.method.name,
            "tasks": [task.name for task in self.stream],
            "stages": [[self.stream[i].name for i in members] for members in self.plan.stages],
            "matrix": [self.scores(t) for t in range(number + 1)],
            "untrained": self.scores(UNTRAINED) if self.plan.has_untrained else None,
            "costs": self.costs,
            "settings": settings.to_dict(),
        }
        results |= self.more_results(results)
        results["summary"] = self.report.summarise(results)
        if self.processes.is_first:
            if complete:
                self.report.write([results], self.out)
                self.log((self.out / "table.md").read_text(encoding="utf-8"))
            # Last: what says that it is complete, is.
            write_json(self.out / RESULTS, results)
        return results


def versions(*libraries: str) -> dict[str, str]:
    """Versions of torch, and of those of other libraries that were used."""
    found: dict[str, str] = {"torch": torch.__version__}
    return found | {n: sys.modules[n].__version__ for n in libraries if n in sys.modules}
