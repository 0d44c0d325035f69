"""The picture of `moram inspect`. Draws an `AtomReport`, computes nothing of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ...inspection import AtomReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_firing(report: AtomReport, path: str, file: str | Path) -> None:
    """Draw which atoms fire for which task, and where in the model tasks are told apart.

    Args:
        report: its adapters have the same numbers of atoms of each task, no task
            none. path: the adapter to draw by itself. file: PNG file to write.
    """
    # Drawn without pyplot, which keeps global state and may open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, layers, values = layer_grid({p: report.separation(p) for p in report.paths})
    heights = [1 + 0.3 * len(report.inputs)] * 2 + [1 + 0.3 * len(names)]
    figure = Figure(figsize=(11, 3 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, height_ratios=heights)
    mean = f"mean weight over {len(report.paths)} adapters"
    _draw_weights(figure, axes[0], report, report.mean_weights(), report.share(), mean)
    _draw_weights(figure, axes[1], report, report.weights[path], report.share(path), path)
    image = axes[2].imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes[2].set_xticks(range(len(layers)), layers)
    axes[2].set_yticks(range(len(names)), names, fontsize=8)
    axes[2].set_xlabel("layer")
    axes[2].set_title("how well an adapter's atoms separate the tasks (0 to 1)", fontsize=9)
    figure.colorbar(image, ax=axes[2])
    figure.savefig(file, dpi=110)


def layer_grid(
    values: Mapping[str, float],
) -> tuple[list[str], list[int | str], list[list[float]]]:
    """Numbers by path as a grid: what is left of the path without its layer, by layer.

    Args:
        values: by path. The layer is the first number within the path. Where layers of several
            stacks have such a number, what lies before it is part of the name.
    Returns:
        (names, layers, rows): rows[name][layer], nan where the model has no such adapter.
    """
    found = {path: re.search(r"(?:^|\.)(\d+)(?:\.|$)", path) for path in values}
    stacks = {path[: layer.start()] for path, layer in found.items() if layer}
    cells: dict[tuple[str, int | str], float] = {}
    for path, value in values.items():
        layer = found[path]
        name = path
        if layer:
            stack = f"{path[: layer.start()]} " if len(stacks) > 1 else ""
            name = stack + path[layer.end() :]
        cells[name, int(layer.group(1)) if layer else "-"] = value
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = list(dict.fromkeys(layer for _, layer in cells))
    return names, layers, [[cells.get((n, layer), math.nan) for layer in layers] for n in names]


def _draw_weights(
    figure: Figure, axis: Axes, report: AtomReport, weights: Tensor, share: Tensor, title: str
) -> None:
    image = axis.imshow(
        weights.numpy(), vmin=0, cmap="magma", aspect="auto", interpolation="nearest"
    )
    # With one picture for all adapters, their atoms belong to the same tasks.
    owners = report.owners[report.paths[0]].tolist()
    centres = []
    for t in range(len(report.tasks)):
        start, count = owners.index(t), owners.count(t)
        centres.append(start + (count - 1) / 2)
        if t:
            axis.axvline(start - 0.5, color="white", linewidth=1)
        for i in range(len(report.inputs)):
            # A dark ground keeps the numbers readable on any colour.
            axis.text(
                centres[-1],
                i,
                f"{share[i, t]:.0f}%",
                ha="center",
                va="center",
                color="white",
                fontsize=7,
                bbox={"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1},
            )
    axis.set_xticks(centres, [f"of {task}" for task in report.tasks], fontsize=8)
    axis.set_yticks(range(len(report.inputs)), report.inputs, fontsize=8)
    axis.set_ylabel("input from")
    axis.set_title(f"which atoms fire: {title} (percent: share of the weight)", fontsize=9)
    figure.colorbar(image, ax=axis)
