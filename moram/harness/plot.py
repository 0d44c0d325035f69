"""Pictures of R. Reads results, computes nothing that is not in them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .files import Results, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_matrices(runs: Sequence[Results], path: str | Path) -> None:
    """Draw the accuracy matrix of each run, rows are time.

    Args:
        runs: results. path: PNG file to write.
    """
    # Drawn without pyplot, which keeps global state and may open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    size = 1.2 + 0.62 * len(runs[0]["tasks"])
    figure = Figure(figsize=((size + 1) * columns, size * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, run in zip(axes, runs, strict=False):
        _draw(axis, run)
    for axis in list(axes)[len(runs) :]:
        axis.set_axis_off()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())


def _draw(axis: Axes, run: Results) -> None:
    tasks = run["tasks"]
    values = [[math.nan if v is None else v for v in row] for row in run["matrix"]]
    axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for t, row in enumerate(values):
        for i, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value < 60 else "black"
                axis.text(i, t, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=7)
    names = [stage[0] if len(stage) == 1 else "all" if stage else "-" for stage in run["stages"]]
    axis.set_yticks(range(len(values)), [f"after {n}" for n in names[: len(values)]], fontsize=7)
    settings = run["settings"]
    axis.set_title(f"{run['name']}, seed {settings['seed']}", fontsize=9)
