"""Few points stand for many: k-means centres and mixtures of spherical Gaussians.

Nothing is drawn at random: equal points give equal results.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Of scikit-learn, too: passes at most, what is added to variances, and the gain of a pass in mean
# log-likelihood below which the mixture has settled.
PASSES, FLOOR, SETTLED = 100, 1e-6, 1e-3


class Mixture(NamedTuple):
    """weights [K] (their sum is 1), means [K, E] and variances [K] of spherical Gaussians."""

    weights: Tensor
    means: Tensor
    variances: Tensor


def kmeans(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from centres that lie far apart.

    The first centre is the point next to the mean, each further one the point farthest from the
    centres so far. A centre that loses all its points stays where it is.

    Args:
        points: [N, E], N >= 1. count: centres; all points are centres where there are no more.
    Returns:
        (centres [K, E], the centre of each point [N]), K = min(count, N).
    """
    if count >= len(points):
        return points.clone(), torch.arange(len(points), device=points.device)
    chosen = [int(_squares(points, points.mean(0, keepdim=True)).argmin())]
    while len(chosen) < count:
        nearest = _squares(points, points[chosen]).amin(1)
        # Equal points: a distance of zero would choose one again.
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    centres = points[chosen]
    owner = None
    for _ in range(PASSES):
        found = _squares(points, centres).argmin(1)
        if owner is not None and torch.equal(found, owner):
            break
        owner = found
        centres = torch.stack(
            [points[owner == k].mean(0) if (owner == k).any() else c for k, c in enumerate(centres)]
        )
    assert owner is not None
    return centres, owner


def gaussian_mixture(points: Tensor, count: int) -> Mixture:
    """Expectation-maximisation of a mixture of spherical Gaussians, from k-means.

    Args:
        points: [N, E], N >= 1. count: components, fewer where there are fewer points.
    """
    _, owner = kmeans(points, count)
    shares = torch.nn.functional.one_hot(owner, min(count, len(points))).to(points)
    likelihood = None
    for _ in range(PASSES):
        mixture = _maximise(points, shares)
        logs = _log_densities(points, mixture) + mixture.weights.log()
        joint = logs.logsumexp(1)
        shares, before, likelihood = (logs - joint[:, None]).exp(), likelihood, joint.mean().item()
        if before is not None and abs(likelihood - before) < SETTLED:
            break
    return _maximise(points, shares)


def _maximise(points: Tensor, shares: Tensor) -> Mixture:
    """The mixture of highest likelihood where point n belongs to k by shares [N, K]."""
    counts = shares.sum(0) + 10 * torch.finfo(shares.dtype).eps
    means = shares.T @ points / counts[:, None]
    spread = (shares * _squares(points, means)).sum(0) / (counts * points.shape[1])
    return Mixture(counts / counts.sum(), means, spread + FLOOR)


def _log_densities(points: Tensor, mixture: Mixture) -> Tensor:
    size, variances = points.shape[1], mixture.variances
    squares = _squares(points, mixture.means)
    return -0.5 * (squares / variances + size * (2 * math.pi * variances).log())


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, K] of rows x [N, E] and y [K, E]."""
    return (x[:, None] - y).square().sum(2)
