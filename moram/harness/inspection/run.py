"""What `moram inspect` does: looks into a finished run and writes what it finds.

The counting is `moram.inspection`, the text `lines`, the picture `plot`.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ... import checkpoint
from ...config import check_count
from ...inspection import Batch, find_adapter, inspect_atoms, token_atoms
from ..files import read_json, write_json, write_text
from ..run import CONFIG, RESULTS
from ..settings import EXAMPLES, StreamSettings
from .lines import details, report_lines, summary, text_lines

if TYPE_CHECKING:
    from ..progress import Log
    from ..report import Report

ADAPTERS = "adapters"


@dataclass(frozen=True)
class Choice:
    """What is looked at, some of it by default.

    Args:
        data: folder of the data; None = the run's own.
        tasks: whose inputs to look at, some of the run's; None = all.
        split: one of the benchmark's. limit: at most so many examples a task.
        last: look at the last so many tokens of each example only; None = all.
        adapter: path of the adapter to draw and to show a text with; None = the one that separates
            the tasks best.
        text: also show which atoms fire at each token of it, read like a prompt of the first task.
    """

    data: str | Path | None = None
    tasks: Iterable[str] | None = None
    split: str = "test"
    limit: int = 32
    last: int | None = None
    adapter: str | None = None
    text: str | None = None


class Inputs(ABC):
    """What a benchmark's model reads, from `Looker.find`, before which no model is read.

    kinds: names of the kinds of places. what: of the examples, for the report.
    """

    kinds: tuple[str, ...] = ("token",)
    what: str

    @abstractmethod
    def load(self, log: Log) -> nn.Module:
        """The base model, without adapters."""

    @abstractmethod
    def batches(self) -> Mapping[str, Iterable[Batch]]:
        """Batches by task, for the model that `load` gave, with its adapters."""

    def read(self, text: str) -> tuple[Tensor, list[str]]:
        """Token ids [T] of a text, and what they stand for."""
        raise NotImplementedError


class Looker(ABC):
    """How a benchmark lets its finished runs be looked into."""

    report: ClassVar[Report]
    splits: ClassVar[tuple[str, ...]]
    # Fields of `Choice` that it has no use for.
    without: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def find(self, settings: Any, names: tuple[str, ...], choice: Choice) -> Inputs:
        """The inputs of some tasks of a run with these settings.

        Raises:
            ValueError, OSError: there are none.
        """


def inspect_run(
    run: str | Path,
    lookers: Iterable[Looker],
    choice: Choice | None = None,
    out: str | Path | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Which atoms of a run's adapters fire for which task; writes inspect.json, .md and .png.

    The model reads what it reads when the run is scored.

    Args:
        run: folder that a benchmark's command wrote with method "moram".
        lookers: of the benchmarks whose runs it may be.
        choice: what is looked at. out: folder for the files; None = RUN/inspect.
        log: called with lines of text.
    Returns:
        What was written to inspect.json.
    Raises:
        FileNotFoundError, ValueError: no finished run of MoRAM, no such task, adapter or data; all
            but the adapter and an empty text are found before the model is read.
    """
    # Whatever can be missing is asked for before the work.
    from .plot import draw_firing

    run, choice = Path(run), Choice() if choice is None else choice
    looker, settings, learned = _read_run(run, lookers)
    for name in looker.without:
        if getattr(choice, name) is not None:
            raise ValueError(f"{name} is not for runs of {looker.report.command}: leave it out")
    _among("split", choice.split, looker.splits)
    check_count("limit", choice.limit, 1)
    if choice.last is not None:
        check_count("last", choice.last, 1)
    names = _chosen(learned, choice.tasks)
    inputs = looker.find(settings, names, choice)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = inputs.load(log)
    checkpoint.load(model, run / ADAPTERS)
    if choice.adapter is not None:
        find_adapter(model, choice.adapter)
    read = None if choice.text is None else inputs.read(choice.text)
    batches = inputs.batches()
    report = inspect_atoms(model, batches, learned, last=choice.last, kinds=inputs.kinds)
    path = choice.adapter or report.by_separation()[0]
    found = summary(report) | {"run": str(run), "split": choice.split, "limit": choice.limit}
    found |= {"last": choice.last, "adapter": path}
    found["adapters"] = {p: details(report, p) for p in report.paths}
    lines = report_lines(report, found, inputs.what)
    if read is not None:
        ids, tokens = read
        view = token_atoms(model, ids, path, learned)
        found["text"] = [
            {"token": token, "atoms": [[a.task, a.index, round(a.weight, 4)] for a in atoms]}
            for token, atoms in zip(tokens, view, strict=True)
        ]
        lines += ["", *text_lines(path, tokens, view)]
    out = run / "inspect" if out is None else Path(out)
    write_json(out / "inspect.json", found)
    write_text(out / "inspect.md", "\n".join(lines) + "\n")
    draw_firing(report, path, out / "inspect.png")
    log("\n".join(lines))
    log(f"\ninspect.json, inspect.md and inspect.png are in {out}")
    return found


def _read_run(
    run: Path, lookers: Iterable[Looker]
) -> tuple[Looker, StreamSettings, tuple[str, ...]]:
    """Who looks into a finished run with atoms to look at, its settings, and what it learned."""
    by_format = {looker.report.format: looker for looker in lookers}
    commands = " or ".join(looker.report.command for looker in by_format.values())
    saved = read_json(run / CONFIG)
    if saved is None:
        raise FileNotFoundError(f"{run} is no run of {commands}: it holds no {CONFIG}")
    if saved.get("method") != "moram":
        raise ValueError(f"{run} has no atoms: its method is {saved.get('method')}, not moram")
    results = read_json(run / RESULTS) or {}
    if not results.get("complete"):
        raise ValueError(f"{run} is not finished: the command it began with goes on")
    looker = by_format.get(results.get("format"))
    if looker is None:
        raise ValueError(
            f"{run} is no run of {commands}: the format of its {RESULTS} is "
            f"{results.get('format')!r}"
        )
    if not (run / ADAPTERS / checkpoint.WEIGHTS).is_file():
        raise FileNotFoundError(f"{run} has no MoRAM adapters: {ADAPTERS}/ is gone")
    kept = {name: value for name, value in saved.items() if name != EXAMPLES}
    return looker, looker.report.settings(**kept), tuple(results["tasks"])


def _chosen(learned: Sequence[str], tasks: Iterable[str] | None) -> tuple[str, ...]:
    """The tasks whose inputs are looked at."""
    names = tuple(learned if tasks is None else tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be one or more different names, got {list(names)}")
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
