"""k-means and mixtures of spherical Gaussians, against scikit-learn and by hand."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from moram.methods.clusters import gaussian_mixture, kmeans


def clouds(spread, seed=0, sizes=(5, 9, 3, 7), width=6):
    """Points around distant centres, [N, width] in float64, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    centres = 4 * torch.randn(len(sizes), width, **like)
    labels = torch.repeat_interleave(torch.tensor(sizes))
    points = centres[labels] + spread * torch.randn(len(labels), width, **like)
    return points[torch.randperm(len(points), generator=generator)]


def in_order(rows):
    """Rows sorted by their first number, and that order."""
    order = rows[:, 0].argsort()
    return rows[order], order


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_centres_are_those_of_scikit_learn(seed):
    points = clouds(0.3, seed)
    centres, owner = kmeans(points, 4)
    found = KMeans(4, n_init=20, random_state=0).fit(points.numpy())
    expected = torch.from_numpy(found.cluster_centers_)
    torch.testing.assert_close(in_order(centres)[0], in_order(expected)[0])
    for k, centre in enumerate(centres):
        torch.testing.assert_close(centre, points[owner == k].mean(0))


def test_all_points_are_centres_where_there_are_no_more():
    points = clouds(0.3)[:3]
    for count in (3, 16):
        centres, owner = kmeans(points, count)
        assert torch.equal(centres, points) and owner.tolist() == [0, 1, 2]


def test_equal_points_give_equal_centres_and_no_number_is_lost():
    points = torch.ones(5, 2)
    centres, owner = kmeans(points, 3)
    assert torch.equal(centres, points[:3]) and owner.tolist() == [0] * 5
    mixture = gaussian_mixture(points, 3)
    assert all(t.isfinite().all() for t in mixture)
    assert mixture.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("spread", [0.3, 2.0], ids=["apart", "overlapping"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mixture_is_that_of_scikit_learn_from_the_same_start(spread, seed):
    points = clouds(spread, seed)
    _, owner = kmeans(points, 4)
    shares = torch.nn.functional.one_hot(owner).double()
    sizes = shares.sum(0)
    means = shares.T @ points / sizes[:, None]
    squares = ((points - means[owner]) ** 2).sum(1)
    variances = (shares.T @ squares) / (sizes * points.shape[1])
    expected = GaussianMixture(
        4,
        covariance_type="spherical",
        weights_init=(sizes / sizes.sum()).numpy(),
        means_init=means.numpy(),
        precisions_init=(1 / (variances + 1e-6)).numpy(),
    ).fit(points.numpy())
    found = gaussian_mixture(points, 4)
    close = {"rtol": 1e-6, "atol": 1e-8}
    for ours, theirs in zip(
        found, (expected.weights_, expected.means_, expected.covariances_), strict=True
    ):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), **close)


def test_a_single_component_is_the_mean_and_the_variance_of_a_number():
    points = clouds(1.0)
    weights, means, variances = gaussian_mixture(points, 1)
    assert weights.tolist() == [1.0]
    torch.testing.assert_close(means[0], points.mean(0))
    expected = points.var(0, correction=0).mean() + 1e-6
    torch.testing.assert_close(variances[0], expected)
