"""The selector of tasks on points in a few dimensions, and AlexNet."""

import pytest
import torch
from moe_adapter_runs import save_alexnet
from tiny_models import assert_equal

from moram.methods.selector import TaskSelector, load_alexnet


def cloud(number, count, features=12):
    """Points around a centre, in a plane of their own but for a little noise."""
    centre, plane = torch.Generator().manual_seed(number), torch.Generator().manual_seed(50)
    centre = torch.randn(features, generator=centre)
    points = torch.Generator().manual_seed(10 * number + count)
    basis = torch.randn(2, features, generator=plane)
    rest = 0.1 * torch.randn(count, features, generator=points)
    return centre + 0.3 * torch.randn(count, 2, generator=points) @ basis + rest


def selector_of(numbers=(1, 2, 3), count=200, **more):
    selector, generator = TaskSelector(**({"width": 6} | more)), torch.Generator().manual_seed(0)
    for number in numbers:
        selector.learn(cloud(number, count), generator)
    return selector


def test_points_are_given_to_their_own_task_and_strangers_to_none():
    selector = selector_of()
    for task, number in enumerate((1, 2, 3)):
        chosen = selector.select(cloud(number, 1000))
        assert set(chosen.tolist()) <= {task, -1}
        # The quantile is 0.95, of 40 held-out points.
        assert 0.88 < (chosen == task).float().mean() < 1
    assert (selector.select(cloud(9, 50)) == -1).all()


def test_errors_are_those_of_the_autoencoder_in_the_units_of_the_features():
    selector, points = selector_of(), cloud(2, 7)
    found = selector.errors(points)
    for number, task in enumerate(selector.tasks):
        for row, x in enumerate(points):
            inputs = (x - task["mean"]) / task["spread"]
            hidden = (task["encoder"] @ inputs + task["encoder_bias"]).clamp_min(0)
            output = task["decoder"] @ hidden + task["decoder_bias"]
            rebuilt = task["mean"] + task["spread"] * output
            assert float(found[row, number]) == pytest.approx(float((x - rebuilt).square().mean()))


def test_an_autoencoder_learns_more_than_the_mean_of_its_task():
    points = cloud(1, 1000)
    from_mean = (points - points.mean(0)).square().mean()
    assert selector_of((1,), 2000).errors(points).mean() < 0.5 * from_mean


def test_thresholds_fit_images_that_the_autoencoder_has_not_seen():
    # As few images as features: those seen are rebuilt far better than others of their task.
    selector, generator = TaskSelector(100, lr=0.01), torch.Generator().manual_seed(0)
    selector.learn(cloud(1, 100, 100), generator)
    assert (selector.select(cloud(1, 1000, 100)) == 0).float().mean() > 0.8


def test_a_given_threshold_is_the_same_for_all_tasks():
    points = torch.cat([cloud(1, 5), cloud(9, 5)])
    lowest, chosen = selector_of().errors(points).min(1)
    below, above = lowest.sort().values[4:6].tolist()
    # Half way between two errors, where no rounding can decide.
    assert above > 1.01 * below
    middle = (below + above) / 2
    found = selector_of(threshold=middle).select(points)
    assert_equal(found, torch.where(lowest < middle, chosen, -1))
    assert (selector_of(threshold=0.0).select(points) == -1).all()


def test_a_higher_quantile_turns_fewer_images_away():
    points = cloud(1, 500)
    away = [(selector_of(quantile=q).select(points) == -1).sum() for q in (0.5, 0.8, 1.0)]
    assert away[0] > away[1] > away[2]
    assert 0.3 < away[0] / 500 < 0.7


def test_a_whole_batch_goes_by_its_mean_error():
    selector = selector_of(threshold=1e9)
    points = torch.cat([cloud(1, 2), cloud(3, 5)])
    assert selector.select(points).tolist() == [0] * 2 + [2] * 5
    assert selector.select(points, whole_batch=True).tolist() == [2] * 7


def test_relative_errors_are_parts_of_each_tasks_own_threshold(monkeypatch):
    errors = torch.tensor([[0.3, 0.5, 9.0], [0.5, 2.1, 9.0], [0.1, 0.9, 2.0]])
    thresholds = (0.2, 2.0, 4.0)
    for relative, expected in ((False, [-1, -1, 0]), (True, [1, -1, 1])):
        selector = selector_of(relative=relative)
        for task, threshold in zip(selector.tasks, thresholds, strict=True):
            task["threshold"] = torch.tensor(threshold)
        monkeypatch.setattr(selector, "errors", lambda _: errors)
        # Parts: 1.5, 0.25, 2.25; 2.5, 1.05, 2.25; 0.5, 0.45, 0.5.
        assert selector.select(torch.zeros(3, 12)).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_task_of_very_few_images_can_be_learned(count):
    selector = selector_of((1, 2), count)
    assert selector.errors(cloud(1, 3)).isfinite().all()
    assert selector_of(()).select(cloud(1, 3)).tolist() == [-1] * 3


@torch.no_grad()
def test_alexnet_is_torchvisions_up_to_its_last_convolution(tmp_path):
    path = save_alexnet(tmp_path)
    import torchvision

    net = torchvision.models.AlexNet()
    state = torch.load(path, weights_only=True)
    missing = net.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = load_alexnet(path)(pixels)
    assert found.shape == (1, 256, 13, 13)
    assert torch.equal(found, net.features[:11](pixels))
