"""What a run says while it runs: a bar with its remaining time, steps.csv, TensorBoard."""

import csv
import io
import sys
import time

from .files import write_text

STEPS = "steps.csv"
MINUTE = 60.0
COLUMNS = ("stage", "step", "loss", "lr", "seconds")


class Progress:
    """One bar over all examples of a run, and one row a step in out/steps.csv.

    Args:
        total: examples to train on and to answer. settings: of the run. out: the run's folder.
        processes: `Processes`; only the first of them says anything.
        log: called with a line a minute where there is no terminal for the bar.
    """

    def __init__(self, total, settings, out, processes, log=print):
        from tqdm import tqdm

        self.total, self.done, self.log = max(1, total), 0, log
        self.began = self.told = time.perf_counter()
        self.first, self.path = processes.is_first, out / STEPS
        quiet = settings.quiet or not self.first or not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="ex", desc=settings.method, mininterval=1, disable=quiet)
        self.size, self.speaks = settings.batch_size, quiet and not settings.quiet
        self.file = self.board = None
        if settings.tensorboard and self.first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard")

    def start_stage(self, stage, done):
        """Training of a stage begins at a step: rows that a killed run wrote beyond it go."""
        self._advance(done * self.size)
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

    def step(self, trainer, loss):
        """A step was made."""
        self._advance(self.size)
        self.bar.set_postfix_str(f"task {trainer.index + 1} loss {loss:.3f}", refresh=False)
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

    def end_stage(self):
        """Training of a stage ended."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def answered(self, count):
        """Examples were answered, or had been before."""
        self._advance(count)

    def _advance(self, count):
        self.bar.update(count)
        self.done += count
        now = time.perf_counter()
        if self.speaks and now - self.told >= MINUTE:
            self.told = now
            rest = (now - self.began) * (self.total - self.done) / max(1, self.done) / MINUTE
            self.log(f"{100 * self.done / self.total:.0f} %, about {rest:.0f} minutes to go")

    def close(self):
        """The run is over."""
        self.end_stage()
        self.bar.close()
        if self.board is not None:
            self.board.close()
