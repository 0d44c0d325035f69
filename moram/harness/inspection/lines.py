"""What `moram inspect` says of an `AtomReport`: plain numbers, and Markdown."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...inspection import AtomReport, FiredAtom
from ..tables import markdown

# Adapters that the report names.
SHOWN = 5


def summary(report: AtomReport) -> dict[str, Any]:
    """Numbers over all adapters."""
    kinds = [*report.kinds, "all"]
    return {
        "inputs": list(report.inputs),
        "tasks": list(report.tasks),
        "tokens": list(report.num_tokens),
        "share": rounded(report.share(), 2),
        "reuse": rounded(report.reuse(), 2),
        "reuse_if_even": rounded(report.even_reuse(), 2),
        "fired_per_token": rounded(report.num_fired(), 3),
        "kinds": kinds,
        "fired_places": rounded(report.fired_places(), 2),
        "strength": rounded(report.strength(), 2),
        "dead_atoms": [{"dead": dead, "atoms": atoms} for dead, atoms in report.num_dead()],
    }


def details(report: AtomReport, path: str) -> dict[str, Any]:
    """Numbers of one adapter."""
    return {
        "separation": round(report.separation(path), 4),
        "share": rounded(report.share(path), 2),
        "reuse": rounded(report.reuse(path), 2),
        "fired_per_token": rounded(report.num_fired(path), 3),
        "fired_places": rounded(report.fired_places([path]), 2),
        "strength": rounded(report.strength([path]), 2),
        "dead": list(report.dead(path)),
        "owners": report.owners[path].tolist(),
        "weights": rounded(report.weights[path], 5),
        "fired": rounded(report.fired[path], 5),
    }


def rounded(values: Tensor, digits: int) -> list[Any]:
    """Nested lists of rounded numbers, None for nan."""
    if values.dim() > 1:
        return [rounded(row, digits) for row in values]
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]


def report_lines(report: AtomReport, found: Mapping[str, Any], what: str) -> list[str]:
    """The report as Markdown lines; what: the examples that were looked at."""
    places = "all tokens" if found["last"] is None else f"the last {found['last']} tokens"
    head = (
        f"Percent of the mixture weight by the task that trained the atoms, mean over "
        f"{len(report.paths)} adapters; {found['split']} split, {what}, {places}. Reuse is the "
        "part on earlier tasks' atoms; behind it, what it would be if all atoms weighed the same."
    )
    titles = ["input from", *(f"atoms of {task}" for task in report.tasks), "reuse"]
    rows = []
    for i, name in enumerate(report.inputs):
        # The first task has no earlier ones to reuse.
        first = name == report.tasks[0]
        reuse = "-" if first else f"{found['reuse'][i]:.1f} ({found['reuse_if_even'][i]:.1f})"
        shares = [f"{share:.1f}" for share in found["share"][i]]
        rows.append([name, *shares, reuse, f"{found['fired_per_token'][i]:.2f}"])
    dead = [f"{count['dead']} of {count['atoms']}" for count in found["dead_atoms"]]
    rows.append(["dead atoms", *dead, "", ""])
    best = [
        [path, f"{report.separation(path):.3f}", str(len(report.dead(path)))]
        for path in report.by_separation()[:SHOWN]
    ]
    return [
        head,
        "",
        markdown([*titles, "fired per token"], rows),
        *_place_lines(report),
        "Adapters that separate the tasks best (0 = same atoms equally, 1 = none in common):",
        "",
        markdown(["adapter", "separation", "dead atoms"], best).rstrip("\n"),
    ]


def _place_lines(report: AtomReport) -> list[str]:
    """Where in the inputs and in the model some atom fires, and how strongly all of them write."""
    rows = []
    if len(report.kinds) > 1:
        fired, strength = report.fired_places(), report.strength()
        rows = [[kind, *_cells(fired[:, k], strength[:, k])] for k, kind in enumerate(report.kinds)]
    for name, paths in layers(report.paths).items():
        cells = _cells(report.fired_places(paths)[:, -1], report.strength(paths)[:, -1])
        rows.append([name, *cells])
    return [
        "Percent of the places at which some atom fires / root mean square of the update in "
        "percent of the base output's:",
        "",
        markdown(["place or layer", *report.inputs], rows),
    ]


def _cells(fired: Tensor, strength: Tensor) -> list[str]:
    pairs = zip(fired.tolist(), strength.tolist(), strict=True)
    return ["-" if math.isnan(f) else f"{f:.1f} / {s:.1f}" for f, s in pairs]


def layers(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by layer: what they begin with, up to the first number in them."""
    found: dict[str, list[str]] = {}
    for path in paths:
        layer = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
        found.setdefault(layer.group() if layer else path, []).append(path)
    return found


def text_lines(path: str, tokens: Iterable[str], view: Iterable[Iterable[FiredAtom]]) -> list[str]:
    """The view of a text, token by token, as Markdown lines."""
    # Of the weights themselves: those of inspect.json are rounded already.
    rows = [
        [
            f"`{token!r}`",
            ", ".join(f"{a.task} #{a.index} {a.weight:.2f}" for a in atoms) or "none fired",
        ]
        for token, atoms in zip(tokens, view, strict=True)
    ]
    return [markdown(["token", f"strongest atoms of {path}"], rows).rstrip("\n")]
