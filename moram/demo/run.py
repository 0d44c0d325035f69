"""Runs both methods over a stream, proves that the saved adapters reload, reports and plots."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .. import checkpoint
from ..config import MoRAMConfig, check_count
from ..continual import load_stream
from ..inspection import inspect_atoms
from ..methods import MoRAM, SequentialLoRA, TrainSettings, run_stream
from ..methods.stream import encode_stream, num_examples, score
from .model import NAME, fetch_weights, load_model, pick_dtype
from .report import format_report

DATA = Path(__file__).with_name("data")
TASKS = ("topic", "feeling", "purpose")


@dataclass(frozen=True)
class DemoSettings:
    """What `run_demo` takes; the defaults are what `make demo` runs.

    Args:
        data, tasks: a folder in TRACE's format and the tasks to learn, in order.
        out: folder for results.json, demo.png and the adapters.
        cache: where the weights are kept; None = ~/.cache/moram.
        model: folder of another causal language model in transformers' format, or None.
        atoms: atoms per task, also the rank of LoRA; top_k is the same number.
        value_scale: of MoRAM.
        lr, lora_lr: peak learning rates.
        epochs, batch_size, max_length, seed: see `TrainSettings`.
        threads: CPU threads; None leaves torch's choice.
        dtype: "auto" is bfloat16 where the CPU multiplies it natively, else float32.
    """

    data: Path = DATA
    tasks: tuple[str, ...] = TASKS
    out: Path = Path("out/demo")
    cache: Path | None = None
    model: Path | None = None
    atoms: int = 8
    value_scale: float = 8.0
    lr: float = 3e-3
    lora_lr: float = 2e-3
    epochs: int = 3
    batch_size: int = 8
    max_length: int = 192
    seed: int = 0
    threads: int | None = None
    dtype: str = "auto"


def run_demo(settings, log=print):
    """Run the demo and return its results, as written to out/results.json.

    Raises:
        ValueError, FileNotFoundError: bad data. RuntimeError: the reloaded adapters predict
            something else than the ones that were saved.
    """
    started = time.perf_counter()
    # Whatever can be missing is asked for before the minutes of work, not after them.
    from .plot import plot_results

    stream = load_stream(settings.data, settings.tasks)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        check_count("threads", settings.threads, 1)
        torch.set_num_threads(settings.threads)
    dtype = pick_dtype(settings.dtype)
    methods = _methods(settings)
    if settings.model is not None and not Path(settings.model).is_dir():
        raise FileNotFoundError(f"model must be a folder, {settings.model} is none")
    folder = settings.model or fetch_weights(settings.cache, log)
    name = NAME if settings.model is None else str(settings.model)
    log(f"model: {name}, {dtype}, {torch.get_num_threads()} CPU threads")
    for task in stream:
        log(f"task {task.name}: {len(task.train)} train, {len(task.test)} test examples")
    results = {"model": name, "tasks": [task.name for task in stream], "methods": {}}
    plain = {k: v for k, v in vars(settings).items() if not isinstance(v, Path)}
    results["settings"] = plain | {"dtype": str(dtype), "threads": torch.get_num_threads()}
    untrained = model = None
    for method, train in methods:
        # The first method's model is let go before the second one is read.
        del model
        model, tokenizer = load_model(folder, dtype)
        total = num_examples(stream, train, untrained is None)
        with tqdm(total=total, desc=method.name, unit="ex", mininterval=1) as bar:
            found = run_stream(model, tokenizer, stream, method, train, bar.update, untrained)
        untrained = found.untrained
        results["methods"][method.name] = {
            "matrix": found.matrix,
            "trained": found.trained,
            "seconds": found.seconds,
            "lr": train.lr,
            "losses": found.losses,
        }
        results.setdefault("untrained", found.untrained)
        results.setdefault("majority", found.majority)
        predictions = found.predictions
    # MoRAM ran last: its model is the one to save, look into and reload.
    data = encode_stream(tokenizer, stream, train)
    results["firing"] = firing(model, data, settings.batch_size)
    directory = out / "adapters"
    checkpoint.save(model, directory, tasks=results["tasks"], base_model=name)
    _write(results, out)
    del model
    model, _ = load_model(folder, dtype)
    checkpoint.load(model, directory)
    _, again = score(model, data, train)
    if not all(torch.equal(a, b) for a, b in zip(predictions, again, strict=True)):
        raise RuntimeError(f"the adapters reloaded from {directory} predict something else")
    results["reloaded"] = sum(len(p) for p in again)
    results["total_seconds"] = time.perf_counter() - started
    _write(results, out)
    log(format_report(results))
    plot_results(results, out / "demo.png")
    log(f"adapters, results.json and demo.png are in {out}")
    return results


def _write(results, out):
    text = json.dumps(results, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")


def _methods(settings):
    train = TrainSettings(
        lr=settings.lr,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    config = MoRAMConfig(
        atoms_per_task=settings.atoms, top_k=settings.atoms, value_scale=settings.value_scale
    )
    return (
        (SequentialLoRA(settings.atoms, seed=settings.seed), replace(train, lr=settings.lora_lr)),
        (MoRAM(config, seed=settings.seed), train),
    )


def firing(model, data, batch_size):
    """Which atoms write for which task: mean mixture weights over one test batch of each task.

    Returns:
        share: [input task][task of the atoms], percent of the weight, mean over all adapters;
        path, weights: the adapter whose weights differ most from task to task, and its mean
        weights [input task][atom]. Padding is left out.
    """
    batches = {
        str(i): [(test.input_ids[:batch_size], test.attention_mask[:batch_size])]
        for i, (_, test) in enumerate(data)
    }
    report = inspect_atoms(model, batches, list(batches))
    path = max(report.paths, key=lambda path: report.weights[path].std(0, correction=0).sum())
    return {
        "share": report.share().tolist(),
        "path": path,
        "weights": report.weights[path].tolist(),
    }
