"""The demo: runs of `moram trace` over the shipped tasks, a reload that proves them, a picture."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import check_count
from ..continual import load_stream
from ..inspection import inspect_atoms
from ..models.smollm2 import NAME, fetch_weights, pick_dtype
from .report import format_report
from .settings import METHODS, DemoSettings

if TYPE_CHECKING:
    from ..harness.files import Results
    from ..harness.progress import Log
    from ..trace.encode import Encoder
    from ..trace.settings import TraceSettings
    from ..trace.streams import Cached


def run_demo(settings: DemoSettings, log: Log = print) -> Results:
    """Run the demo and return its results, as written to out/results.json.

    A run that was stopped goes on; one that is finished starts anew.

    Raises:
        ValueError, FileNotFoundError: bad data. RuntimeError: the reloaded adapters answer
            something else than the ones that were saved.
    """
    started = time.perf_counter()
    # Whatever can be missing is asked for before the minutes of work, not after them.
    from ..trace.run import answers_of
    from .plot import plot_results

    out = Path(settings.out)
    # Missing and repeated tasks, before the weights are asked for.
    load_stream(settings.data, settings.tasks)
    check_count("atoms_per_task", settings.atoms, 1)
    if settings.threads is not None:
        check_count("threads", settings.threads, 1)
    dtype = pick_dtype(settings.dtype)
    if settings.model is not None and not Path(settings.model).is_dir():
        raise FileNotFoundError(f"model must be a folder, {settings.model} is none")
    plans = {method: _trace_settings(settings, method) for method in METHODS}
    folder = settings.model or fetch_weights(settings.cache, log)
    name = NAME if settings.model is None else str(settings.model)
    plans = {method: replace(plan, model=str(folder)) for method, plan in plans.items()}
    threads = settings.threads or torch.get_num_threads()
    plans = {method: replace(plan, **_padding(dtype)) for method, plan in plans.items()}
    log(f"model: {name}, {dtype}, {threads} CPU threads")
    results: Results = {"model": name, "tasks": list(settings.tasks), "methods": {}}
    plain = {k: v for k, v in vars(settings).items() if not isinstance(v, Path)}
    results["settings"] = plain | {"dtype": str(dtype), "threads": threads}
    cached: Cached = {}
    for method, found in _learn(plans, cached, threads, log).items():
        results["methods"][found["name"]] = {
            "matrix": found["matrix"],
            "trained": [cost["trained"] for cost in found["costs"]],
            "seconds": [cost["seconds"] for cost in found["costs"]],
            "lr": plans[method].lr,
        }
        results["untrained"] = results.get("untrained") or found["untrained"]
        results["majority"] = found["majority"]
    plan = plans["moram"]
    model, texts, encoder = answers_of(plan, Path(plan.out) / "adapters", cached)
    results["firing"] = firing(model, encoder, settings)
    _write(results, out)
    for i, (task, again) in enumerate(zip(settings.tasks, texts, strict=True)):
        last = len(settings.tasks) - 1
        path = Path(plan.out) / "predictions" / f"results-{last}-{i}-{task}.json"
        if json.loads(path.read_text(encoding="utf-8"))["results"] != again:
            raise RuntimeError(f"the adapters reloaded from {plan.out} answer {task} otherwise")
    results["reloaded"] = sum(map(len, texts))
    results["total_seconds"] = time.perf_counter() - started
    _write(results, out)
    log(format_report(results))
    plot_results(results, out / "demo.png")
    log(f"results.json and demo.png are in {out}, the adapters in {plan.out}/adapters")
    return results


def _trace_settings(settings: DemoSettings, method: str) -> TraceSettings:
    """The settings of one method's run, but for the model's folder."""
    from ..trace.settings import make_settings

    changes: dict[str, Any] = {
        "model": "none",
        "data": str(settings.data),
        "tasks": tuple(settings.tasks),
        "method": method,
        "out": str(Path(settings.out) / method),
        "rank": settings.atoms,
        "lr": settings.lora_lr if method == "lora" else settings.lr,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "first_layer": settings.first_layer,
        "cache_prefix": settings.first_layer > 0,
        "seed": settings.seed,
        "threads": settings.threads,
        "dtype": settings.dtype,
        # Once is enough.
        "untrained": method == METHODS[0],
    }
    if method == "moram":
        changes["method_args"] = {"protect": settings.protect or None}
    return make_settings("demo", method=method, changes=[changes])


def _padding(dtype: torch.dtype) -> dict[str, int]:
    """Padding costs work; in bfloat16, a CPU compiles a kernel for every length."""
    return {"pad_multiple": 16 if dtype is torch.bfloat16 else 1}


def _learn(
    plans: dict[str, TraceSettings], cached: Cached, threads: int, log: Log
) -> dict[str, Results]:
    """The results of both runs, by method.

    On a CPU they run side by side with half of the threads each: the products of one step are too
    small to be shared well.
    """
    from ..trace.run import keep_states, run_trace

    for plan in plans.values():
        _start_anew(Path(plan.out))
    first, second = METHODS
    if threads < 2 or torch.cuda.is_available():
        return {method: run_trace(plans[method], log, cached=cached) for method in METHODS}
    for method in METHODS:
        # Fewer threads for the rest, also for the reload.
        plans[method] = replace(plans[method], threads=threads // 2)
    if plans[first].cache_prefix:
        keep_states(replace(plans[first], threads=threads), cached, log)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "states.pt"
        torch.save(cached, path)
        arguments = (replace(plans[first], quiet=True), path)
        # It ends with this process.
        other = get_context("spawn").Process(target=_learn_beside, args=arguments, daemon=True)
        other.start()
        found = run_trace(plans[second], log, cached=cached)
        log(f"waiting for {first}")
        other.join()
    if other.exitcode:
        raise RuntimeError(
            f"the run of {first} failed, see above; its folder is {plans[first].out}"
        )
    text = (Path(plans[first].out) / "results.json").read_text(encoding="utf-8")
    return {first: json.loads(text), second: found}


def _learn_beside(plan: TraceSettings, path: Path) -> None:
    """What another process does; it writes its results."""
    from ..trace.run import run_trace

    # Ctrl-C ends the first process, and this one with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_trace(plan, cached=torch.load(path))


def _start_anew(folder: Path) -> None:
    results = folder / "results.json"
    if results.is_file() and json.loads(results.read_text(encoding="utf-8")).get("complete"):
        shutil.rmtree(folder)


def _write(results: Mapping[str, Any], out: Path) -> None:
    text = json.dumps(results, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")


def firing(model: nn.Module, encoder: Encoder, settings: DemoSettings) -> dict[str, Any]:
    """Which atoms write for which task: mean mixture weights over a few test examples of each.

    Returns:
        share: [input task][task of the atoms], percent of the weight, mean over all adapters;
        path, weights: the adapter whose weights differ most from task to task, and its mean
        weights [input task][atom]. Padding is left out.
    """
    batches = {}
    for task in load_stream(settings.data, settings.tasks):
        rows = encoder.examples(task.name, task.test[:8])
        ids, mask, _ = rows.batch(range(len(rows)))
        batches[task.name] = [(ids, mask)]
    report = inspect_atoms(model, batches, list(settings.tasks))
    # Over one task there is no spread.
    path = max(report.paths, key=lambda path: report.weights[path].std(0, correction=0).sum())
    return {
        "share": report.share().tolist(),
        "path": path,
        "weights": report.weights[path].tolist(),
    }
