"""Keeping new rows out of what earlier inputs occupy: this project's addition, for any rows that
read a layer's input, the keys of atoms and LoRA's A alike.

Projecting out what earlier inputs occupy is gradient projection memory's idea (Saha et al., ICLR
2021, arXiv 2103.09762), here for the rows themselves and not for their gradients.
"""

import warnings
from typing import NamedTuple

import torch

from .sketch import InputSketch
from .wrappers import listed

# Above it, a layer's new inputs lie in the protected directions, and rounding would be amplified.
MAX_GAIN = 100.0
# With less of the new inputs' energy left outside, a layer has next to nothing to learn in.
MIN_LEFT = 0.01


class Guard(NamedTuple):
    """Rows K act as gain (K - K basis^T basis), and are trained so; basis: orthonormal [k, D]."""

    basis: torch.Tensor
    gain: float

    def acting(self, rows):
        """Rows [N, D] as they act, in their own dtype."""
        return (self.gain * kept_out(rows.to(self.basis.dtype), self.basis)).to(rows.dtype)


class Fresh(NamedTuple):
    """What a guard of a layer is made from: its fresh rows [n, D] and those of earlier tasks
    [m, D], the sketch of earlier inputs, the part of their energy to keep out of, and how strong
    the fresh rows' first scores shall be against the others'."""

    rows: torch.Tensor
    frozen: torch.Tensor
    sketch: InputSketch
    energy: float
    strength: float


def kept_out(rows, basis):
    """Rows [N, D] without what lies in the directions of a basis [k, D]."""
    return rows - (rows @ basis.T) @ basis


@torch.no_grad()
def guards(fresh, inputs):
    """The guards of some layers' fresh rows.

    Args:
        fresh: `Fresh` by path. inputs: `Inputs` of the new task.
    Returns:
        `Guard` by path. With the gain, the root mean square of a fresh row's score on the new
        inputs is strength times the mean of the frozen ones', but it is at most `MAX_GAIN`.
    """
    found, little = {}, {}
    for first, moment in inputs.moments():
        for path, layer in fresh.items():
            if inputs.leader[path] == first:
                basis = layer.sketch.basis(layer.energy).to(layer.rows.device)
                old = _rms_scores(layer.frozen, moment).mean()
                new = _rms_scores(kept_out(layer.rows.to(basis.dtype), basis), moment).mean()
                gain = min(MAX_GAIN, float(layer.strength * old / new.clamp_min(1e-12)))
                found[path] = Guard(basis, gain)
                inside = _rms_scores(basis, moment).square().sum()
                left = max(0.0, float(1 - inside / moment.trace().clamp_min(1e-30)))
                if left < MIN_LEFT:
                    little[path] = f"{path} ({len(basis)} directions, {left:.2%})"
    if little:
        warnings.warn(
            "protected directions leave next to nothing to learn in; of the new inputs' energy is "
            f"outside them: {listed([*little.values()], 4)}; lower protect or protect_size",
            stacklevel=7,
        )
    return found


def _rms_scores(rows, moment):
    """sqrt(k^T C k) for each row: the root mean square of its scores on inputs of moment C."""
    rows = rows.to(moment)
    return ((rows @ moment) * rows).sum(1).clamp_min(0).sqrt()
