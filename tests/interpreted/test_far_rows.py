"""Rows as far apart as the last tokens of long sequences: no offset may be counted in 32 bits."""

from dataclasses import replace

import pytest
import torch
from interpreter import looking_for_overflow
from paths import ALL, TRAINED, call, run_training
from support import far_rows, make_case

# The last rows lie more than 2^31 numbers from the first.
ROWS = 20
TENSORS = ("x", "keys", "values", "current_keys", "current_values", "residual", "grad")


def near_and_far(training):
    case = make_case(
        0, (ROWS,), ROWS, ROWS, 32, 32, top_k=4, training=training, dtype=torch.bfloat16
    )
    return case, replace(case, **{name: far_rows(getattr(case, name)) for name in TENSORS})


@pytest.mark.parametrize("path", ALL)
def test_output_of_far_rows(path):
    near, apart = near_and_far(training=False)
    with looking_for_overflow():
        assert torch.equal(call(apart, path), call(near, path))


@pytest.mark.parametrize("path", TRAINED)
def test_gradients_of_far_rows(path):
    near, apart = near_and_far(training=True)
    expected, _ = run_training(near, path)
    with looking_for_overflow():
        actual, _ = run_training(apart, path)
    assert actual.keys() == expected.keys() and len(expected) == 5
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
