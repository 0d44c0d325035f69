"""What a layer's inputs look like, without keeping any: the sketch of their second moment.

Knows no training and no task. What reads the inputs is in `inputs.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs

# A full decomposition of a moment wider than this needs more than a gibibyte: its leading
# directions are then found by subspace iteration.
MAX_FULL = 8192


class InputSketch:
    """The uncentred second moment of a layer's inputs, as its leading directions.

    `rows` [k, D]: row i is the square root of an eigenvalue times its eigenvector; `total`: the
    trace. Both are None before the first moment.

    Args:
        size: directions kept at most.
    """

    def __init__(self, size: int, rows: Tensor | None = None, total: Tensor | None = None) -> None:
        self.size: int = size
        self.rows: Tensor | None = rows
        self.total: Tensor | None = total

    def add(self, moment: Tensor) -> None:
        """Add a second moment [D, D], such as the mean of x x^T over a task's inputs; it is
        overwritten."""
        total = moment.trace()
        if self.rows is not None and self.total is not None:
            # After a restart they may still lie on the CPU.
            rows = self.rows.to(moment)
            moment.addmm_(rows.T, rows)
            total = total + self.total.to(moment)
        values, vectors = leading(moment, self.size)
        self.rows, self.total = (vectors * values.clamp_min(0).sqrt()).T.contiguous(), total

    def basis(self, energy: float) -> Tensor:
        """Orthonormal rows [k, D]: the fewest that hold that part of the trace, or all kept."""
        assert self.rows is not None and self.total is not None
        values = self.rows.square().sum(1)
        short = values.cumsum(0) / self.total.clamp_min(1e-30) < energy
        count = min(int(short.sum()) + 1, len(values))
        return self.rows[:count] / values[:count, None].sqrt().clamp_min(1e-30)


def owners_of(sketches: Mapping[str, InputSketch]) -> dict[str, str]:
    """By path, the first path with the same sketch: of layers that read one input.

    It is one object, or several of equal numbers, as files that hold one for each layer give.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    owners = {}
    for path, sketch in sketches.items():
        if sketch.rows is None or sketch.total is None:
            owners[path] = path
            continue
        known = alike.setdefault((sketch.size, sketch.rows.shape, float(sketch.total)), [])
        found = (other for other in known if _same(sketches[other], sketch))
        owners[path] = next(found, path)
        if owners[path] == path:
            known.append(path)
    return owners


def _same(one: InputSketch, other: InputSketch) -> bool:
    if one is other:
        return True
    assert one.rows is not None and other.rows is not None
    return torch.equal(one.rows, other.rows.to(one.rows))


def pack_sketches(sketches: Mapping[str, InputSketch]) -> dict[str, dict[str, Any]]:
    """Sketches by path as plain data; layers that read one input share one, which is kept once.

    Returns:
        {"owners": the path that keeps a path's sketch, "sketches": its [rows, total] by that path}.
    """
    owners = owners_of(sketches)
    kept = {path: [sketches[path].rows, sketches[path].total] for path in set(owners.values())}
    return {"owners": owners, "sketches": kept}


def unpack_sketches(state: Mapping[str, Any], size: int) -> dict[str, InputSketch]:
    """Inverse of `pack_sketches`, {} of a state without; size as for `InputSketch`."""
    kept = state.get("sketches", {})
    kept = {path: InputSketch(size, *parts) for path, parts in kept.items()}
    return {path: kept[owner] for path, owner in state.get("owners", {}).items()}


def remember(
    sketches: Mapping[str, InputSketch], inputs: Inputs, size: int
) -> dict[str, InputSketch]:
    """The sketches of some layers with a task's inputs added.

    Args:
        sketches: by path, of earlier inputs; a path may be missing. inputs: `Inputs`.
        size: of a new sketch.
    Returns:
        New sketches by path; layers that read one input share one.
    """
    found = {}
    for first, moment in inputs.moments():
        old = sketches.get(first) or InputSketch(size)
        found[first] = InputSketch(old.size, old.rows, old.total)
        found[first].add(moment)
    return {path: found[first] for path, first in inputs.leader.items()}


def leading(moment: Tensor, size: int, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [k] of a symmetric matrix [D, D], in descending order, and their
    vectors [D, k], k = min(size, D)."""
    width = len(moment)
    if width <= MAX_FULL or 2 * size > width:
        values, vectors = torch.linalg.eigh(moment)
        return values.flip(0)[:size], vectors.flip(1)[:, :size]
    # Halko et al., SIAM Review 2011, arXiv 0909.4061: more columns than wanted, then the small one.
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, size + size // 4 + 8, generator=generator).to(moment)
    for _ in range(iterations):
        basis = torch.linalg.qr(moment @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ moment @ basis)
    return values.flip(0)[:size], basis @ vectors.flip(1)[:, :size]
