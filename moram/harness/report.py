"""What results come to: the numbers that follow from R, one table of several runs, files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from .compare import groups
from .files import Results, write_text
from .settings import StreamSettings
from .tables import (
    Table,
    cost_cells,
    latex,
    markdown,
    matrix_lines,
    read_results,
    spread,
    write_csv,
)


class Report(ABC):
    """How a benchmark shows its results; it says the class variables, and overrides what differs.

    format: "format" in its results.json. command: what writes them, for messages. settings: their
    class. summary: name in results.json: (column title, function of R). shows_tasks: whether the
    table has the last score of each task. unit: what costs are counted by. stored: format of the
    stored MiB. legend: a line above R.
    """

    format: ClassVar[Any]
    command: ClassVar[str]
    settings: ClassVar[type[StreamSettings]]
    summary: ClassVar[dict[str, tuple[str, Callable[[Sequence[Sequence[float]]], float]]]]
    shows_tasks: ClassVar[bool] = True
    unit: ClassVar[str] = "stage"
    stored: ClassVar[str] = ".1f"
    legend: ClassVar[str] = "R[t, i], score on task i after training task t:"

    @abstractmethod
    def notes(self, runs: list[Results]) -> str:
        """What is said below the tables."""

    def summarise(self, results: Results) -> dict[str, float]:
        """The scores that follow from R, those that are defined, by name.

        Args:
            results: what results.json holds. One stage (zero-shot, joint training) has no change
                over time, hence only the mean of its row: the first of `summary`.
        """
        matrix = results["matrix"]
        if len(results["stages"]) == 1:
            return {next(iter(self.summary)): mean(matrix[0])} if matrix else {}
        if len(matrix) < len(results["stages"]):
            return {}
        return {name: function(matrix) for name, (_, function) in self.summary.items()}

    def check_alike(self, runs: list[Results]) -> None:
        """Raise ValueError unless runs may stand in one table."""
        first = runs[0]
        for run in runs:
            if sorted(run["tasks"]) != sorted(first["tasks"]):
                names = f"{first['tasks']} and {run['tasks']}"
                raise ValueError(f"runs must share their tasks, got {names}")

    def before(self, runs: list[Results]) -> list[list[str]]:
        """Rows that come first."""
        return []

    def after(self, run: Results) -> list[list[str]]:
        """Rows that follow the row of a run's method."""
        return []

    def more(self, run: Results) -> dict[str, str]:
        """The last cells of a row, by column title."""
        return {}

    def table(self, runs: list[Results]) -> Table:
        """One row a method: means over its runs, with the standard deviation of several.

        Args:
            runs: list of results. Runs of one method that differ in order and seed alone are one
                row; where other settings differ, each has a row that names them.
        Returns:
            (titles, rows of text).
        Raises:
            ValueError: the runs do not fit into one table, see `check_alike`.
        """
        self.check_alike(runs)
        tasks = list(runs[0]["tasks"]) if self.shows_tasks else []
        titles = ["method", "runs", *tasks, *(title for title, _ in self.summary.values())]
        titles += [f"trained / {self.unit}", "stored MiB", f"seconds / {self.unit}", "peak MiB"]
        titles += self.more(runs[0])
        rows = self.before(runs)
        for name, group in groups(runs, self.settings).items():
            last = [dict(zip(run["tasks"], run["matrix"][-1], strict=True)) for run in group]
            row = [name, str(len(group)), *(spread([one[task] for one in last]) for task in tasks)]
            row += [spread([run["summary"].get(key) for run in group]) for key in self.summary]
            row += [*cost_cells(group, self.stored), *self.more(group[0]).values()]
            rows += [row, *self.after(group[0])]
        return titles, [row + [""] * (len(titles) - len(row)) for row in rows]

    def tables(self, runs: list[Results]) -> list[Table]:
        """All tables that are written, `table` first."""
        return [self.table(runs)]

    def read(self, folders: Iterable[str | Path]) -> list[Results]:
        """results.json of several runs; see `tables.read_results`."""
        return read_results(folders, (self.format,), self.command)

    def write(self, runs: list[Results], out: str | Path) -> None:
        """Write table.md, table.csv, table.tex and matrix.png into a folder."""
        from .plot import draw_matrices

        out, tables = Path(out), self.tables(runs)
        text = "\n".join(markdown(*table) for table in tables)
        if len(runs) == 1:
            text += f"\n{self.legend}\n\n" + "\n".join(matrix_lines(runs[0])) + "\n"
        write_text(out / "table.md", f"{text}\n{self.notes(runs)}\n")
        # All tables as one sheet, an empty row between them.
        width = max(len(titles) for titles, _ in tables)
        sheet = [row for titles, rows in tables for row in ([], titles, *rows)][1:]
        padded = [row + [""] * (width - len(row)) if row else [] for row in sheet]
        write_csv(out / "table.csv", padded[0], padded[1:])
        write_text(out / "table.tex", "\n".join(latex(*table) for table in tables))
        draw_matrices(runs, out / "matrix.png")
