"""Many runs, one after the other, each in its own folder, and the table of all of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..methods.registry import make_method
from ..processes import Processes
from .files import Results, read_json, write_json
from .progress import Log
from .report import Report
from .run import RESULTS, STATE
from .settings import StreamSettings

# The name of each run's folder below the sweep's, and its settings.
Runs = Sequence[tuple[str, StreamSettings]]
ALL = "all"


def methods_of(known: list[str], names: str) -> list[str]:
    """The methods that a text names: some, separated by commas, or "all" that fit a benchmark.

    Args:
        known: those that fit. names: the text.
    Raises:
        ValueError: a method does not exist or does not fit.
    """
    found = known if names == ALL else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        listed = ", ".join(known)
        got = unknown[0] if unknown else names
        raise ValueError(f"invalid choice: {got!r} (choose from {ALL}, {listed})")
    return found


def expand(
    make: Callable[[dict[str, Any]], StreamSettings],
    methods: Iterable[str] | None,
    seeds: Iterable[int] | None,
) -> Runs:
    """A run for each method and seed, seeds outermost, each with a folder of its own.

    Args:
        make: function from changes to settings, whose `out` is the folder of all.
        methods, seeds: None = the settings' own.
    Raises:
        ValueError: a method does not take its arguments, or two runs are the same.
    """
    runs = []
    for seed in [{}] if seeds is None else [{"seed": seed} for seed in seeds]:
        for method in [{}] if methods is None else [{"method": name} for name in methods]:
            settings = make(seed | method)
            # Now instead of after the hours of the others.
            make_method(settings.method, **settings.method_args)
            name = f"{settings.method}-seed{settings.seed}"
            if name in dict(runs):
                raise ValueError(f"seeds and methods must differ, got {name} twice")
            runs.append((name, replace(settings, out=str(Path(settings.out) / name))))
    return runs


def share_of(text: str) -> tuple[int, int]:
    """(index, count) of "INDEX/COUNT", a process's share of the runs.

    Raises:
        ValueError: it is no such text, or the index is not below the count.
    """
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(
            f"a shard must be INDEX/COUNT with an index below the count, such as 0/2, got {text!r}"
        )
    return int(index), int(count)


def sweep(
    runs: Runs,
    out: str | Path,
    run: Callable[[StreamSettings], Results],
    report: Report,
    share: tuple[int, int] = (0, 1),
    only: str = "",
    log: Log = print,
) -> bool:
    """Do a share of some runs, and write the tables when all of them are finished.

    A finished run is not done again, and one that was stopped goes on. What a finished run needs no
    more, its state, is removed.

    Args:
        runs: all of them. out: folder of table.md and what else `Report.write` writes, and of
            runs.json, the results of all runs without the folders of this machine.
        run: does one. report: of its benchmark.
        share: (index, count): of count processes with the same runs, this one does each count-th.
        only: do those alone whose name contains it.
        log: called with a line a run, and the table.
    Returns:
        Whether the tables were written.
    Raises:
        RuntimeError: runs failed; the others were done.
    """
    (index, count), failed = share, []
    for name, settings in [own for own in runs if only in own[0]][index::count]:
        if is_finished(settings.out):
            continue
        start = time.perf_counter()
        try:
            results = run(settings)
        except (OSError, RuntimeError, ValueError) as error:
            # One of several processes cannot go on without the others.
            if Processes().world > 1:
                raise
            failed.append(f"{name}: {error}")
            log(f"{name} failed: {error}")
            continue
        if Processes().is_first:
            found = ", ".join(f"{k} {value:.1f}" for k, value in results["summary"].items())
            log(f"{name}: {found or 'no summary'}; {time.perf_counter() - start:.0f} s")
            (Path(settings.out) / STATE).unlink(missing_ok=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed; {failed[0]}")
    folders = [settings.out for _, settings in runs]
    if not Processes().is_first or not all(map(is_finished, folders)):
        return False
    results = report.read(folders)
    report.write(results, out)
    for found in results:
        for key in (report.settings.word("data"), "out"):
            found["settings"][key] = Path(found["settings"][key]).name
    write_json(Path(out) / "runs.json", results)
    log((Path(out) / "table.md").read_text(encoding="utf-8"))
    return True


def is_finished(folder: str | Path) -> bool:
    """Whether a run in that folder is complete."""
    results = read_json(Path(folder) / RESULTS)
    return results is not None and bool(results.get("complete"))
