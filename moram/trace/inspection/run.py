"""What `moram inspect` does: looks into a finished run of moram trace and writes what it finds.

The counting is `moram.inspection`, the picture `plot`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checkpoint
from ...config import check_count
from ...continual import load_stream
from ...continual.data import Task, check_characters
from ...harness.files import read_json, write_json, write_text
from ...harness.run import CONFIG, RESULTS
from ...harness.settings import EXAMPLES
from ...harness.tables import markdown
from ...inspection import AtomReport, FiredAtom, find_adapter, inspect_atoms, token_atoms
from ..encode import Batch, Encoder, by_length, decoded
from ..model import load
from ..settings import SPLITS, TraceSettings

if TYPE_CHECKING:
    from ...harness.progress import Log

ADAPTERS = "adapters"
# Adapters that the report names.
SHOWN = 5


def inspect_run(
    run: str | Path,
    *,
    data: str | Path | None = None,
    tasks: Iterable[str] | None = None,
    split: str = "test",
    limit: int = 32,
    last: int | None = None,
    adapter: str | None = None,
    text: str | None = None,
    out: str | Path | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Which atoms of a run's adapters fire for which task; writes inspect.json, .md and .png.

    The model reads what it reads when the run is scored: the prompts, and where decoding is
    "forced" the true answers behind them.

    Args:
        run: folder that `moram trace` wrote with method "moram".
        data: folder in TRACE's format; None = the run's own.
        tasks: whose inputs to look at, some of the run's; None = all.
        split: "train", "eval" or "test". limit: at most so many examples a task, the first.
        last: look at the last so many tokens of each example only; None = all.
        adapter: path of the adapter to draw and to show a text with; None = the one that separates
            the tasks best.
        text: also show which atoms fire at each token of it, read like a prompt of the first task.
        out: folder for the files; None = RUN/inspect.
        log: called with lines of text.
    Returns:
        What was written to inspect.json.
    Raises:
        FileNotFoundError, ValueError: no finished run of MoRAM, no such task, adapter or data; all
            but the adapter and an empty text are found before the model is read.
    """
    # Whatever can be missing is asked for before the work.
    from .plot import draw_firing

    run = Path(run)
    settings = _read_settings(run)
    _among("split", split, SPLITS)
    check_count("limit", limit, 1)
    if last is not None:
        check_count("last", last, 1)
    names = _chosen(settings.tasks, tasks)
    stream = load_stream(data or settings.data, names, dict.fromkeys(names, split), split)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(settings, device, log)
    learned = checkpoint.load(model, run / ADAPTERS)["tasks"]
    if adapter is not None:
        find_adapter(model, adapter)
    encoder = Encoder(tokenizer, settings)
    read = None if text is None else _encode_text(encoder, names[0], text).to(device)
    batches = {task.name: _batches(encoder, settings, task, limit) for task in stream}
    report = inspect_atoms(model, batches, learned, last=last)
    path = adapter or report.by_separation()[0]
    found = _summary(report) | {"run": str(run), "split": split, "limit": limit, "last": last}
    found |= {"adapter": path, "adapters": {p: _details(report, p) for p in report.paths}}
    lines = _lines(report, found)
    if read is not None:
        view = token_atoms(model, read, path, learned)
        tokens = [decoded(tokenizer, [token]) for token in read.tolist()]
        found["text"] = [
            {"token": token, "atoms": [[a.task, a.index, round(a.weight, 4)] for a in atoms]}
            for token, atoms in zip(tokens, view, strict=True)
        ]
        lines += ["", *_text_lines(path, tokens, view)]
    out = run / "inspect" if out is None else Path(out)
    write_json(out / "inspect.json", found)
    write_text(out / "inspect.md", "\n".join(lines) + "\n")
    draw_firing(report, path, out / "inspect.png")
    log("\n".join(lines))
    log(f"\ninspect.json, inspect.md and inspect.png are in {out}")
    return found


def _read_settings(run: Path) -> TraceSettings:
    """The settings of a finished run with atoms to look at."""
    saved = read_json(run / CONFIG)
    if saved is None:
        raise FileNotFoundError(f"{run} is no run of moram trace: it holds no {CONFIG}")
    if saved.get("method") != "moram":
        raise ValueError(f"{run} has no atoms: its method is {saved.get('method')}, not moram")
    if not (read_json(run / RESULTS) or {}).get("complete"):
        raise ValueError(f"{run} is not finished: the moram trace command it began with goes on")
    if not (run / ADAPTERS / checkpoint.WEIGHTS).is_file():
        raise FileNotFoundError(f"{run} has no MoRAM adapters: {ADAPTERS}/ is gone")
    return TraceSettings(**{name: value for name, value in saved.items() if name != EXAMPLES})


def _chosen(learned: Sequence[str], tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The tasks whose inputs are looked at."""
    names = tuple(learned if tasks is None else tasks)
    for name in names:
        _among("tasks", name, learned)
    return names


def _among(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        raise ValueError(
            f"{argument} must be among {', '.join(allowed)}, got {value!r}"
            + (f": did you mean {close[0]}?" if close else "")
        )


def _batches(encoder: Encoder, settings: TraceSettings, task: Task, limit: int) -> Iterator[Batch]:
    """What the model reads of a task when it is scored, in batches of similar lengths."""
    examples = task.test[:limit]
    if settings.of("decoding", task.name) == "generate":
        rows = encoder.prompts(task.name, [example.prompt for example in examples])
    else:
        rows = encoder.scored(task.name, examples)
    order = by_length(rows)
    for start in range(0, len(order), settings.eval_batch):
        yield rows.batch(order[start : start + settings.eval_batch])


def _encode_text(encoder: Encoder, task: str, text: str) -> Tensor:
    check_characters("text", text)
    ids = encoder.prompts(task, [text]).ids[0] if text.strip() else []
    if not ids:
        raise ValueError(f"text must hold at least one token, got {text!r}")
    return torch.tensor(ids)


def _summary(report: AtomReport) -> dict[str, Any]:
    """Numbers over all adapters."""
    return {
        "inputs": list(report.inputs),
        "tasks": list(report.tasks),
        "tokens": list(report.num_tokens),
        "share": _rounded(report.share(), 2),
        "reuse": _rounded(report.reuse(), 2),
        "reuse_if_even": _rounded(report.even_reuse(), 2),
        "fired_per_token": _rounded(report.num_fired(), 3),
        "dead_atoms": [{"dead": dead, "atoms": atoms} for dead, atoms in report.num_dead()],
    }


def _details(report: AtomReport, path: str) -> dict[str, Any]:
    """Numbers of one adapter."""
    return {
        "separation": round(report.separation(path), 4),
        "share": _rounded(report.share(path), 2),
        "reuse": _rounded(report.reuse(path), 2),
        "fired_per_token": _rounded(report.num_fired(path), 3),
        "dead": list(report.dead(path)),
        "owners": report.owners[path].tolist(),
        "weights": _rounded(report.weights[path], 5),
        "fired": _rounded(report.fired[path], 5),
    }


def _rounded(values: Tensor, digits: int) -> list[Any]:
    if values.dim() > 1:
        return [_rounded(row, digits) for row in values]
    return [round(value, digits) for value in values.tolist()]


def _lines(report: AtomReport, found: Mapping[str, Any]) -> list[str]:
    """The report as Markdown lines."""
    places = "all tokens" if found["last"] is None else f"the last {found['last']} tokens"
    head = (
        f"Percent of the mixture weight by the task that trained the atoms, mean over "
        f"{len(report.paths)} adapters; {found['split']} split, at most {found['limit']} examples "
        f"a task, {places}. Reuse is the part on earlier tasks' atoms; behind it, what it would be "
        "if all atoms weighed the same."
    )
    titles = ["input from", *(f"atoms of {task}" for task in report.tasks), "reuse"]
    rows = []
    for i, name in enumerate(report.inputs):
        # The first task has no earlier ones to reuse.
        first = name == report.tasks[0]
        reuse = "-" if first else f"{found['reuse'][i]:.1f} ({found['reuse_if_even'][i]:.1f})"
        shares = [f"{share:.1f}" for share in found["share"][i]]
        rows.append([name, *shares, reuse, f"{found['fired_per_token'][i]:.2f}"])
    dead = [f"{count['dead']} of {count['atoms']}" for count in found["dead_atoms"]]
    rows.append(["dead atoms", *dead, "", ""])
    best = [
        [path, f"{report.separation(path):.3f}", str(len(report.dead(path)))]
        for path in report.by_separation()[:SHOWN]
    ]
    return [
        head,
        "",
        markdown([*titles, "fired per token"], rows),
        "Adapters that separate the tasks best (0 = same atoms equally, 1 = none in common):",
        "",
        markdown(["adapter", "separation", "dead atoms"], best).rstrip("\n"),
    ]


def _text_lines(path: str, tokens: Iterable[str], view: Iterable[Iterable[FiredAtom]]) -> list[str]:
    """The view of a text, token by token, as Markdown lines."""
    # Of the weights themselves: those of inspect.json are rounded already.
    rows = [
        [
            f"`{token!r}`",
            ", ".join(f"{a.task} #{a.index} {a.weight:.2f}" for a in atoms) or "none fired",
        ]
        for token, atoms in zip(tokens, view, strict=True)
    ]
    return [markdown(["token", f"strongest atoms of {path}"], rows).rstrip("\n")]
