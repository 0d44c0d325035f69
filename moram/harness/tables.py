"""Tables as Markdown, CSV and LaTeX, and the pieces that go into them."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .files import Results, read_json, write_text

# Titles, and rows of text.
Table = tuple[list[str], list[list[str]]]


def spread(values: Iterable[float | None]) -> str:
    """Mean, and standard deviation where there are several values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{mean(known):.1f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.1f}"


def cost_cells(group: Iterable[Results], stored: str) -> list[str]:
    """What runs of one method cost: trained numbers, stored MiB, seconds a stage, peak MiB.

    Args:
        group: results. stored: format of the stored MiB.
    """
    costs = [cost for run in group for cost in run["costs"]]
    return [
        f"{max(cost['trained'] for cost in costs):,}",
        format(max(cost.get("stored_bytes", 0) for cost in costs) / 2**20, stored),
        f"{mean(cost['seconds'] for cost in costs):.0f}",
        f"{max(cost['peak_mib'] for cost in costs):.0f}",
    ]


def matrix_lines(results: Results) -> list[str]:
    """R as a Markdown table: rows are time, columns the tested tasks."""
    tasks = results["tasks"]
    after = [", ".join(stage) if len(stage) <= 1 else "all" for stage in results["stages"]]
    rows = [(f"after {name}" if name else "score") for name in after]
    lines = ["| | " + " | ".join(tasks) + " |", "| --- " * (len(tasks) + 1) + "|"]
    for name, row in zip(rows, results["matrix"], strict=True):
        cells = ("" if value is None else f"{value:.1f}" for value in row)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    titles, *rows = [[cell.replace("|", r"\|") for cell in row] for row in (titles, *rows)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def latex(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as LaTeX, for the booktabs package."""
    escapes = {c: f"\\{c}" for c in "&%_#${}"}
    escapes |= {"±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    escapes["\\"] = r"\textbackslash{}"

    def line(cells: Iterable[str]) -> str:
        return " & ".join("".join(escapes.get(c, c) for c in cell) for cell in cells) + r" \\"

    body = "\n".join(map(line, rows))
    columns = "l" + "r" * (len(titles) - 1)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(titles)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def write_csv(path: str | Path, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table as CSV."""
    sheet = io.StringIO()
    csv.writer(sheet).writerows([titles, *rows])
    write_text(path, sheet.getvalue())


def read_results(
    folders: Iterable[str | Path], formats: Collection[Any], command: str
) -> list[Results]:
    """results.json of several runs.

    Args:
        folders: of runs, or the files themselves. formats: what their "format" may be.
        command: that writes them, for messages.
    Raises:
        FileNotFoundError, ValueError: a folder holds none, or a run that is not complete.
    """
    found = []
    for folder in folders:
        path = Path(folder) / "results.json" if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: no run of {command} ended there")
        results = read_json(path)
        if not isinstance(results, dict) or results.get("format") not in formats:
            raise ValueError(f"{path} was not written by {command}")
        if not results.get("complete"):
            raise ValueError(f"{path}: the run is not complete")
        found.append(results)
    return found
