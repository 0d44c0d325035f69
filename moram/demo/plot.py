"""The demo's results as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import ADDITION

if TYPE_CHECKING:
    from ..harness.files import Results


def plot_results(results: Results, path: str | Path) -> None:
    """Write a PNG: both matrices, the first task over time, and which atoms fire for which task."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for axis, (name, run) in zip(axes[0], results["methods"].items(), strict=True):
        _draw_matrix(axis, name, run["matrix"], results["tasks"])
    _draw_first_task(axes[1][0], results)
    _draw_firing(axes[1][1], results, figure)
    title = f"{results['model']} learns {len(results['tasks'])} tasks in a row"
    if any("protected" in name for name in results["methods"]):
        title += f"\n{ADDITION}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_matrix(
    axis: Axes, name: str, matrix: Sequence[Sequence[float | None]], tasks: Sequence[str]
) -> None:
    # A task that was not learned yet has no score.
    scores = [[float("nan") if value is None else value for value in row] for row in matrix]
    axis.imshow(scores, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for t, row in enumerate(matrix):
        for i, value in enumerate(row):
            if value is None:
                continue
            dark = value < 60
            weight = "bold" if t == i else "normal"
            axis.text(
                i,
                t,
                f"{value:.0f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontweight=weight,
            )
    axis.set_title(f"{name}: accuracy, percent")
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(range(len(tasks)), [f"after {task}" for task in tasks])
    axis.set_xlabel("tested on")


def _draw_first_task(axis: Axes, results: Results) -> None:
    tasks = results["tasks"]
    for name, run in results["methods"].items():
        axis.plot([row[0] for row in run["matrix"]], marker="o", label=name)
    axis.axhline(results["majority"][0], color="grey", linestyle=":", label="majority class")
    axis.set_title(f"the first task, {tasks[0]}, over time")
    axis.set_xticks(range(len(tasks)), [f"after {task}" for task in tasks])
    axis.set_ylabel("accuracy, percent")
    axis.set_ylim(0, 100)
    axis.legend()


def _draw_firing(axis: Axes, results: Results, figure: Figure) -> None:
    tasks, firing = results["tasks"], results["firing"]
    rows, share = firing["weights"], firing["share"]
    image = axis.imshow(rows, cmap="magma", aspect="auto", interpolation="nearest")
    per_task = len(rows[0]) / len(tasks)
    for t in range(len(tasks)):
        if t:
            axis.axvline(t * per_task - 0.5, color="white", linewidth=1)
        for i in range(len(tasks)):
            # A dark ground keeps the numbers readable on any colour.
            axis.text(
                (t + 0.5) * per_task - 0.5,
                i,
                f"{share[i][t]:.0f}%",
                ha="center",
                va="center",
                color="white",
                bbox={"facecolor": "black", "alpha": 0.6, "linewidth": 0},
            )
    axis.set_xticks(
        [(t + 0.5) * per_task - 0.5 for t in range(len(tasks))], [f"of {task}" for task in tasks]
    )
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_xlabel("MoRAM's atoms, by the task that trained them")
    axis.set_ylabel("input from")
    axis.set_title(
        f"which atoms fire: mean weight in {firing['path']}\n(percent: share over all projections)",
        fontsize=9,
    )
    figure.colorbar(image, ax=axis)
