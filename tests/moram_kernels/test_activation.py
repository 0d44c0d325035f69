"""Every setting of self-activation: its default, what it accepts, and what its refusal says."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from moram_kernels import SelfActivation, retrieve


def test_defaults():
    assert dataclasses.asdict(SelfActivation()) == {
        "top_k": 8,
        "temperature": 0.03,
        "threshold": 0.2,
        "eps": 1e-12,
    }


def test_settings_cannot_be_changed_later():
    activation = SelfActivation()
    with pytest.raises(dataclasses.FrozenInstanceError):
        activation.top_k = 3


def test_equal_settings_are_equal_and_hash_alike():
    one, other = SelfActivation(4, 0.1, 0.0), SelfActivation(top_k=4, temperature=0.1, threshold=0)
    assert one == other and hash(one) == hash(other)
    assert one != SelfActivation(4, 0.1, 0.1)


@pytest.mark.parametrize("value", [1.0, "8", None, True, torch.tensor(3)], ids=repr)
def test_top_k_must_be_an_integer(value):
    with pytest.raises(TypeError, match=r"^top_k must be an integer >= 1, got ") as error:
        SelfActivation(top_k=value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, -3])
def test_top_k_must_be_at_least_one(value):
    with pytest.raises(ValueError, match=rf"^top_k must be >= 1, got {value}$"):
        SelfActivation(top_k=value)


@pytest.mark.parametrize("name", ["temperature", "threshold", "eps"])
@pytest.mark.parametrize("value", ["0.1", None, False, 1j, [0.1]], ids=repr)
def test_the_others_must_be_numbers(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got ") as error:
        SelfActivation(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["temperature", "eps"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("inf"), float("nan")])
def test_temperature_and_eps_must_be_finite_and_positive(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be finite and > 0, got {value}$"):
        SelfActivation(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 2, float("inf"), float("nan")])
def test_threshold_must_be_in_zero_to_one(value):
    message = rf"^threshold must be in \[0, 1\) \(0 turns it off\), got {value}$"
    with pytest.raises(ValueError, match=message):
        SelfActivation(threshold=value)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 10**6},
        {"top_k": np.int64(2)},
        {"temperature": 1},
        {"temperature": np.float32(0.5)},
        {"temperature": Fraction(1, 2)},
        {"threshold": 0},
        {"threshold": 0.999},
        {"threshold": np.float64(0.5)},
        {"threshold": Fraction(1, 2)},
        {"eps": 1e-30},
    ],
    ids=repr,
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_accepted_also_runs(tokens, backend, settings):
    generator = torch.Generator().manual_seed(0)
    x, keys, values = (
        torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (tokens, 5, 5)
    )
    plain = {name: float(v) if name != "top_k" else int(v) for name, v in settings.items()}
    update = retrieve(x, keys, values, SelfActivation(**settings), backend=backend)
    expected = retrieve(x, keys, values, SelfActivation(**plain), backend=backend)
    assert update.shape == (tokens, 4) and torch.equal(update, expected)
