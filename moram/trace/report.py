"""Results of language tasks as numbers and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..continual import metrics
from ..continual.data import Task
from ..continual.scorers import Scorer
from ..harness.report import Report
from .settings import TraceSettings

if TYPE_CHECKING:
    from ..harness.files import Results


class TraceReport(Report):
    """`Report` of `moram trace`."""

    format = 1
    command = "moram trace"
    settings = TraceSettings
    summary = {  # noqa: RUF012
        "overall_performance": ("OP", metrics.overall_performance),
        "plasticity": ("just learned", metrics.plasticity),
        "backward_transfer": ("BWT (unclipped, T-1)", metrics.backward_transfer),
        "trace_backward_transfer": ("BWT (unclipped, T)", metrics.trace_backward_transfer),
        "trace_forgetting": ("BWT (TRACE: clipped, T, sign flipped)", metrics.trace_forgetting),
        "forgetting": ("forgetting (from best)", metrics.forgetting),
    }

    def before(self, runs: list[Results]) -> list[list[str]]:
        """The majority class, and the untrained model where a run scored it."""
        untrained = [run for run in runs if run["untrained"]][:1]
        found = [("majority class", runs[0], "majority")]
        found += [("untrained", run, "untrained") for run in untrained]
        rows = []
        for name, run, key in found:
            row = dict(zip(run["tasks"], run[key], strict=True))
            rows.append([name, "", *(f"{row[task]:.1f}" for task in runs[0]["tasks"])])
        return rows

    def more(self, run: Results) -> dict[str, str]:
        return {"task id": "yes" if run["needs_task_id"] else "no"}

    def check_alike(self, runs: list[Results]) -> None:
        super().check_alike(runs)
        first = runs[0]
        for run in runs:
            for key in ("model", "eval_split", "eval_limit"):
                one, other = (r["settings"].get(key) for r in (first, run))
                if one != other:
                    raise ValueError(f"runs must be scored alike, got {key} {one!r} and {other!r}")
            for key in ("metrics", "decoding", "majority"):
                one, other = (dict(zip(r["tasks"], r[key], strict=True)) for r in (first, run))
                for task in one:
                    if one[task] != other[task]:
                        raise ValueError(
                            f"runs must be scored alike, got {key} {one[task]} and {other[task]} "
                            f"for {task}"
                        )

    def notes(self, runs: list[Results]) -> str:
        parts = zip(*(runs[0][key] for key in ("tasks", "metrics", "decoding")), strict=True)
        lines = [f"- {task}: {metric}, decoding {decoding}" for task, metric, decoding in parts]
        return "Scores in percent:\n\n" + "\n".join(lines)


REPORT = TraceReport()


def majority_row(stream: Sequence[Task], scorers: Iterable[Scorer]) -> list[float]:
    """What always giving a task's most frequent answer scores, by the task's own scorer."""
    row = []
    for task, scorer in zip(stream, scorers, strict=True):
        answers = [example.answer for example in task.test]
        (most, _), *_ = Counter(answers).most_common(1)
        prompts = [example.prompt for example in task.test]
        row.append(scorer.function(prompts, [most] * len(answers), answers))
    return row
