"""A run over a stream: train, score, write, and go on after a stop at any point."""

import time
from pathlib import Path

import torch

from .. import checkpoint
from ..inject import adapters
from ..layers import AdapterLinear
from ..methods.processes import Processes
from ..methods.train import Stage, TaskTrainer
from .compare import differences
from .encode import Encoder
from .files import check_space, read_json, read_state, write_json, write_state
from .memory import peak_mib, reset_peak
from .model import compile_parts, fit_context, load, shard
from .plan import Plan
from .predict import forced, generate
from .progress import STEPS, Progress
from .report import FORMAT, summarise, write_report
from .streams import StreamRows, is_forced

STATE, CONFIG, RESULTS = "state.pt", "config.json", "results.json"
# What a run writes besides JSON: a folder that holds one of them without CONFIG is not its own.
OWN = (STATE, STEPS, "predictions", "adapters", "table.md", "table.csv", "table.tex", "matrix.png")
UNTRAINED = "untrained"


class Stopped(Exception):
    """The run was asked to stop, and saved what it had."""


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
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    processes = Processes()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    quiet = settings.quiet or not processes.is_first
    log = (lambda line: None) if quiet else log
    return Run(settings, processes, accelerator, log, stop, cached).execute()


class Run:
    """One run. What can be wrong is found by `check` and `prepare`, before any training."""

    def __init__(self, settings, processes, accelerator, log, stop, cached=None):
        self.settings, self.processes, self.log, self.stop = settings, processes, log, stop
        self.device = accelerator.device
        self.sharded = settings.shard or "FSDP" in str(accelerator.distributed_type)
        self.out = Path(settings.out)
        self.costs = []
        self.cached = {} if cached is None else cached

    def execute(self):
        """See `run_trace`."""
        self.check()
        done = read_json(self.out / RESULTS)
        if done is not None and done["complete"]:
            self.log(f"{self.out} holds the finished run")
            return done
        self.prepare()
        # Methods know adapters by their paths in the model as it is trained.
        with self.rows.upper():
            self.restore()
        if self.plan.has_untrained:
            self.score(UNTRAINED, range(len(self.stream)))
        for number, members in enumerate(self.plan.stages):
            with self.rows.upper():
                self.learn(number, members)
            last = len(self.stream) if self.settings.full_matrix else number + 1
            seen = range(last) if len(self.plan.stages) > 1 else range(len(self.stream))
            self.score(number, seen)
            self.write(number)
        if self.processes.is_first and adapters(self.model):
            tasks = [task.name for task in self.stream]
            checkpoint.save(
                self.model, self.out / "adapters", tasks=tasks, base_model=self.settings.model
            )
        results = self.write(len(self.plan.stages) - 1, complete=True)
        self.progress.close()
        self.processes.wait()
        return results

    def check(self):
        """Check all that needs no model."""
        if self.sharded and self.settings.cache_prefix:
            raise ValueError("cache_prefix and a sharded model do not go together")
        self.plan = Plan(self.settings)
        self.method, self.stream = self.plan.method, self.plan.stream
        # For the picture at the end: better missed now than then.
        import matplotlib  # noqa: F401

        self.open_folder()

    def prepare(self):
        """Load the model, and make everything ready to train."""
        settings = self.settings
        self.model, self.tokenizer = load(settings, self.device, self.log)
        settings = fit_context(self.model, settings, self.log)
        needed = 3 * sum(p.numel() for p in self.model.parameters()) // 10
        check_space(self.out, needed)
        encoder = Encoder(self.tokenizer, settings)
        for task in self.stream:
            prompts, answers = encoder.num_cut(task.name, task.train + task.test)
            self.log(
                f"{task.name}: {len(task.train)} train, {len(task.test)} {settings.eval_split} "
                f"examples; longer than allowed: {prompts} prompts, {answers} answers"
            )
        self.method.setup(self.model)
        # By their paths in the whole model, whichever part of it runs later.
        self.adapters = adapters(self.model, AdapterLinear)
        if settings.compile:
            compile_parts(self.model)
        if self.sharded:
            shard(self.model)
        self.progress = Progress(self.plan.work(), settings, self.out, self.processes)
        self.rows = StreamRows(
            self.stream,
            encoder,
            self.method,
            self.model,
            settings,
            any(self.plan.stages),
            self.cached,
        )
        # Last, so that a folder whose run could not begin is free for a corrected command.
        if self.processes.is_first:
            write_json(self.out / CONFIG, self.settings.to_dict())
        self.processes.wait()

    def open_folder(self):
        """Make the folder, or check that what it holds is of this very run."""
        self.out.mkdir(parents=True, exist_ok=True)
        saved = read_json(self.out / CONFIG)
        foreign = any(self.out.glob("*.json")) or any((self.out / name).exists() for name in OWN)
        if (saved is None and foreign) or not isinstance(saved, dict | None):
            raise ValueError(f"{self.out} holds files of something else: name another out folder")
        changed = differences(self.settings, saved) if saved else []
        if changed:
            raise ValueError(
                f"{self.out} holds a run with other settings; name another out folder, or go back "
                f"to its settings: {'; '.join(changed)}"
            )
        self.processes.wait()

    def restore(self):
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
        if state["examples"] != self.plan.fingerprint:
            raise ValueError(f"the examples in {self.settings.data} changed since {self.out} began")
        for path, tensors in state["adapters"].items():
            self.adapters[path].load_adapter_state(tensors)
        self.method.load_state_dict(state["method"])
        self.log(f"going on: stage {state['stage'] + 1} of {len(self.plan.stages)}")

    def learn(self, number, members):
        """Train one stage, or what is left of it."""
        state = self.state
        if number < state["stage"] or (number == state["stage"] and state["finished"]):
            self.progress.answered(self.plan.examples(members))
            return
        fresh = number > state["stage"]
        if fresh:
            self.costs.append({"seconds": 0.0, "peak_mib": 0.0, "trained": 0})
        if members:
            parts = [self.rows.train[i] for i in members]
            data, settings = type(parts[0]).join(parts), self.plan.train_settings(members)
            stage = Stage(self.model, data, settings)
            reset_peak(self.device)
            self.saved = self.noted = time.perf_counter()
            if fresh:
                self.method.begin_task(self.model, number, stage)
            trainer = TaskTrainer(self.model, self.method, data, settings, number, self.processes)
            self.costs[-1]["trained"] = sum(p.numel() for p in trainer.parameters)
            if not fresh:
                trainer.load_state_dict(state["trainer"])
            self.progress.start_stage(number, trainer.done)
            trainer.run(self.after_step)
            self.progress.end_stage()
            self.method.end_task(self.model, number, stage)
            self.note_costs()
        self.state = {"stage": number, "finished": True}
        self.save()

    def after_step(self, trainer, loss):
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

    def asked_to_stop(self):
        """Whether the first process was asked to stop: all of them stop together."""
        return self.processes.broadcast(self.stop())

    def note_costs(self):
        """Add up what this stage has cost since the last note."""
        now = time.perf_counter()
        self.costs[-1]["seconds"] += now - self.noted
        self.costs[-1]["peak_mib"] = max(self.costs[-1]["peak_mib"], peak_mib(self.device))
        self.noted = now

    def save(self):
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
                "examples": self.plan.fingerprint,
            },
        )

    def score(self, number, members):
        """Answer and score some tasks, each once and for all."""
        for i in members:
            path = self.prediction(number, i)
            task = self.stream[i]
            if self.processes.broadcast(path.is_file()):
                self.progress.answered(len(task.test))
                continue
            trained = (self.state["stage"], self.state["finished"])
            if trained != ((-1, True) if number == UNTRAINED else (number, True)):
                raise ValueError(f"{path} is gone, and so is the model that gave these answers")
            if self.asked_to_stop():
                raise Stopped("stopped between two tasks; the same command goes on from here")
            if number != UNTRAINED:
                self.method.select(self.model, i)
            texts = self.answer(i)
            prompts, labels = [e.prompt for e in task.test], [e.answer for e in task.test]
            score = self.plan.scorers[i].function(prompts, texts, labels)
            if self.processes.is_first:
                found = {"score": score, "metric": self.plan.scorers[i].variant}
                write_json(
                    path, {"eval": found, "prompts": prompts, "results": texts, "labels": labels}
                )
            self.processes.wait()

    def answer(self, i):
        """The model's answers to a task."""
        task, step = self.stream[i], self.progress.answered
        common = (self.model, self.tokenizer, self.rows.test[i], self.settings)
        if not is_forced(self.settings, task.name):
            return generate(*common, task.name, self.processes, step)
        with self.rows.upper():
            return forced(*common, self.processes, step)

    def prediction(self, number, i):
        """Where the answers of a stage to a task are kept."""
        return self.out / "predictions" / f"results-{number}-{i}-{self.stream[i].name}.json"

    def scores(self, number):
        """A row of R: a score for each task, None where there is none."""
        found = [read_json(self.prediction(number, i)) for i in range(len(self.stream))]
        return [None if f is None else f["eval"]["score"] for f in found]

    def write(self, number, complete=False):
        """Write results.json and, at the end, the tables and the picture."""
        settings = self.settings
        results = {
            "format": FORMAT,
            "complete": complete,
            "method": settings.method,
            "name": settings.label or self.method.name,
            "tasks": [task.name for task in self.stream],
            "stages": [[self.stream[i].name for i in members] for members in self.plan.stages],
            "matrix": [self.scores(t) for t in range(number + 1)],
            "untrained": self.scores(UNTRAINED) if self.plan.has_untrained else None,
            "majority": self.plan.majority,
            "metrics": [scorer.variant for scorer in self.plan.scorers],
            "decoding": [settings.of("decoding", task.name) for task in self.stream],
            "needs_task_id": self.method.needs_task_id,
            "costs": self.costs,
            "processes": self.processes.world,
            "settings": settings.to_dict(),
            "versions": versions(),
        }
        results["summary"] = summarise(results)
        if self.processes.is_first:
            if complete:
                write_report([results], self.out)
                self.log((self.out / "table.md").read_text(encoding="utf-8"))
            # Last: what says that it is complete, is.
            write_json(self.out / RESULTS, results)
        return results


def versions():
    """Versions of what the numbers depend on."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
