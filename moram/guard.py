"""Keeping new rows out of what earlier inputs occupy: this project's addition, for any rows that
read a layer's input, the keys of atoms and LoRA's A alike.

Projecting out what earlier inputs occupy is gradient projection memory's idea (Saha et al., ICLR
2021, arXiv 2103.09762), here for the rows themselves and not for their gradients.
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .sketch import InputSketch, owners_of
from .wrappers import listed

# Above it, a layer's new inputs lie in the protected directions, and rounding would be amplified.
MAX_GAIN = 100.0
# With less of the new inputs' energy left outside, a layer has next to nothing to learn in.
MIN_LEFT = 0.01


class Guard(NamedTuple):
    """Rows K act as gain (K - K basis^T basis), and are trained so; basis: orthonormal [k, D]."""

    basis: Tensor
    gain: float

    def acting(self, rows: Tensor) -> Tensor:
        """Rows [N, D] as they act, in their own dtype."""
        return (self.gain * kept_out(rows.to(self.basis.dtype), self.basis)).to(rows.dtype)


class Fresh(NamedTuple):
    """What a guard of a layer is made from: its fresh rows [n, D] and those of earlier tasks
    [m, D], the sketch of earlier inputs, the part of their energy to keep out of, and how strong
    the fresh rows' first scores shall be against the others'."""

    rows: Tensor
    frozen: Tensor
    sketch: InputSketch
    energy: float
    strength: float


def kept_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows [N, D] without what lies in the directions of a basis [k, D]."""
    return rows - (rows @ basis.T) @ basis


@torch.no_grad()
def guards(fresh: Mapping[str, Fresh], inputs: Inputs) -> dict[str, Guard]:
    """The guards of some layers' fresh rows.

    Args:
        fresh: `Fresh` by path. inputs: `Inputs` of the new task.
    Returns:
        `Guard` by path. With the gain, the root mean square of a fresh row's score on the new
        inputs is strength times the mean of the frozen ones', but it is at most `MAX_GAIN`.
    """
    bases, owners, readers = {}, {}, {}
    same = owners_of({path: new.sketch for path, new in fresh.items()})
    for path, new in fresh.items():
        # Layers that read one input share a sketch: they share its directions, too.
        owner = owners.setdefault((same[path], new.energy), path)
        if owner == path:
            bases[path] = new.sketch.basis(new.energy).to(new.rows.device)
        basis = bases[path] = bases[owner]
        rows = kept_out(new.rows.to(basis.dtype), basis)
        readers[path] = torch.cat([new.frozen.to(rows), rows, *[basis] * (owner == path)])
    found, little = {}, {}
    measured = inputs.mean_squares(readers)
    for path, new in fresh.items():
        basis, (squares, energy) = bases[path], measured[path]
        ends = len(new.frozen), len(new.frozen) + len(new.rows)
        old, fresh_squares, inside = squares.tensor_split(ends)
        score = fresh_squares.sqrt().mean().clamp_min(1e-12)
        found[path] = Guard(basis, min(MAX_GAIN, float(new.strength * old.sqrt().mean() / score)))
        if not len(inside):
            continue
        left = max(0.0, float(1 - inside.sum() / energy.clamp_min(1e-30)))
        if left < MIN_LEFT:
            little[path] = f"{path} ({len(basis)} directions, {left:.2%})"
    if little:
        warnings.warn(
            "protected directions leave next to nothing to learn in; of the new inputs' energy is "
            f"outside them: {listed([*little.values()], 4)}; lower protect or protect_size",
            stacklevel=7,
        )
    return found
