"""What a run says while it runs: bars with their remaining time, steps.csv, TensorBoard."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from .files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ..methods.train import TaskTrainer
    from ..processes import Processes
    from .settings import StreamSettings

STEPS = "steps.csv"
MINUTE = 60.0
COLUMNS = ("stage", "step", "loss", "lr", "seconds")
# Is called with lines of text.
Log = Callable[[str], object]


class Bar:
    """A bar over some examples; a line a minute where there is no terminal for it.

    Args:
        total: examples. name: of the bar. settings: of the run; says whether it is quiet.
        processes: only the first of them says anything.
        log: called with the lines. prefix: what the lines begin with; None = the name.
    """

    total: int
    done: int
    log: Log
    prefix: str
    began: float
    told: float
    bar: Any
    speaks: bool

    def __init__(
        self,
        total: int,
        name: str,
        settings: StreamSettings,
        processes: Processes,
        log: Log = print,
        prefix: str | None = None,
    ) -> None:
        from tqdm import tqdm

        self.total, self.done, self.log = max(1, total), 0, log
        self.prefix = f"{name}: " if prefix is None else prefix
        self.began = self.told = time.perf_counter()
        silent = settings.quiet or not processes.is_first
        shown = sys.stderr.isatty() and not silent
        self.bar = tqdm(total=total, unit="ex", desc=name, mininterval=1, disable=not shown)
        self.speaks = not shown and not silent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int) -> None:
        """So many more examples are done."""
        self.bar.update(count)
        self.done += count
        now = time.perf_counter()
        if self.speaks and now - self.told >= MINUTE:
            self.told = now
            rest = (now - self.began) * (self.total - self.done) / max(1, self.done) / MINUTE
            share = 100 * self.done / self.total
            self.log(f"{self.prefix}{share:.0f} %, about {rest:.0f} minutes to go")

    def note(self, text: str) -> None:
        """Show a text behind the bar."""
        self.bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """The examples are done, or given up."""
        self.bar.close()


class Progress:
    """One bar over all examples of a run, and one row a step in out/steps.csv.

    Args:
        total: examples to train on and to answer. settings: of the run. out: the run's folder.
        processes, log: see `Bar`.
    """

    bar: Bar
    first: bool
    path: Path
    size: int
    start: float

    def __init__(
        self,
        total: int,
        settings: StreamSettings,
        out: Path,
        processes: Processes,
        log: Log = print,
    ) -> None:
        self.bar = Bar(total, settings.method, settings, processes, log, prefix="")
        self.first, self.path, self.size = processes.is_first, out / STEPS, settings.batch_size
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None
        if settings.tensorboard and self.first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard")

    def start_stage(self, stage: int, done: int) -> None:
        """Training of a stage begins at a step: rows that a killed run wrote beyond it go."""
        self.bar.advance(done * self.size)
        self.start = time.perf_counter()
        if not self.first:
            return
        kept = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)][1:]
            kept = [row for row in rows if (int(row[0]), int(row[1])) < (stage, done)]
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *kept])
        write_text(self.path, text.getvalue())
        self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def step(self, trainer: TaskTrainer, loss: float) -> None:
        """A step was made."""
        self.bar.advance(self.size)
        self.bar.note(f"task {trainer.index + 1} loss {loss:.3f}")
        if self.file is None:
            return
        rate = trainer.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - self.start
        row = (trainer.index, trainer.done - 1, f"{loss:.6g}", f"{rate:.6g}", f"{seconds:.2f}")
        csv.writer(self.file).writerow(row)
        self.file.flush()
        if self.board is not None:
            self.board.add_scalar(f"loss/{trainer.index}", loss, trainer.done)
            self.board.add_scalar(f"lr/{trainer.index}", rate, trainer.done)

    def end_stage(self) -> None:
        """Training of a stage ended."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def answered(self, count: int) -> None:
        """Examples were answered, or had been before."""
        self.bar.advance(count)

    def close(self) -> None:
        """The run is over."""
        self.end_stage()
        self.bar.close()
        if self.board is not None:
            self.board.close()
