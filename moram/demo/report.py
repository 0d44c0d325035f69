"""The demo's results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..continual.metrics import backward_transfer, forgetting, overall_performance, plasticity

if TYPE_CHECKING:
    from ..harness.files import Results

LEARNED = 20
ADDITION = (
    "protected: new keys stay out of the directions of earlier tasks' inputs; this project's own "
    "addition to the published rule"
)


def format_report(results: Results) -> str:
    """Both accuracy matrices and what follows from them, ready to print."""
    lines = []
    for name, run in results["methods"].items():
        lines += ["", f"{name}: accuracy in percent, R[t, i] = task i after training task t"]
        lines += _matrix(results, run["matrix"])
    lines += ["", *_summary(results), ""]
    if any("protected" in name for name in results["methods"]):
        lines.append(ADDITION)
    lines.append(
        f"reloaded into a fresh model: all {results['reloaded']} test predictions identical"
    )
    for name, run in results["methods"].items():
        for t, task in enumerate(results["tasks"]):
            if run["matrix"][t][t] < results["majority"][t] + LEARNED:
                lines.append(
                    f"not learned: {task} by {name} ({run['matrix'][t][t]:.0f}, less than "
                    f"{LEARNED} points above its majority class)"
                )
    lines.append(f"total {results['total_seconds']:.0f} s")
    return "\n".join(lines)


def _matrix(results: Results, matrix: Sequence[Sequence[float]]) -> list[str]:
    tasks = results["tasks"]
    width = max(len(task) for task in (*tasks, "majority class")) + 8
    rows = [
        ("majority class", results["majority"]),
        ("untrained", results["untrained"]),
        *((f"after {task}", row) for task, row in zip(tasks, matrix, strict=True)),
    ]
    head = " " * width + "".join(f"{task:>{len(task) + 3}}" for task in tasks)
    return [head] + [
        f"{name:<{width}}"
        + "".join(f"{_cell(v):>{len(task) + 3}}" for task, v in zip(tasks, values, strict=True))
        for name, values in rows
    ]


def _cell(value: float | None) -> str:
    """A score; a task that was not learned yet has none."""
    return "-" if value is None else f"{value:.1f}"


def _summary(results: Results) -> list[str]:
    columns = (
        ("overall performance", lambda run: f"{overall_performance(run['matrix']):.1f}"),
        ("backward transfer", lambda run: f"{backward_transfer(run['matrix']):+.1f}"),
        ("forgetting", lambda run: f"{forgetting(run['matrix']):.1f}"),
        ("when just learned", lambda run: f"{plasticity(run['matrix']):.1f}"),
        ("trained parameters/task", lambda run: f"{max(run['trained']):,}"),
        ("training seconds", lambda run: f"{sum(run['seconds']):.0f}"),
    )
    methods = results["methods"]
    width = max(len(name) for name, _ in columns) + 3
    head = " " * width + "".join(f"{name:>18}" for name in methods)
    return [head] + [
        f"{name:<{width}}" + "".join(f"{show(run):>18}" for run in methods.values())
        for name, show in columns
    ]
