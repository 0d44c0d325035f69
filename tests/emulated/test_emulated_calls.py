"""Known calls, executed as compiled: the bits of the first call, without Triton's own path."""

from unittest import mock

import pytest
import torch
from emulated_driver import emulated
from paths import forced
from support import make_case, run

from moram_kernels.triton_backend import launcher

# Rows, frozen and current atoms, features, outputs.
SIZES = {"resident": (67, 41, 7, 64, 96), "split-gather": (21, 151, 7, 144, 80)}


@pytest.mark.parametrize("path", SIZES)
def test_known_calls_give_the_bits_of_the_first(path):
    rows, *sizes = SIZES[path]
    settings = {"top_k": 4, "temperature": 0.1, "dtype": torch.bfloat16}
    case = make_case(0, (rows,), *sizes, **settings)
    # Of one planner, because another one plans anew.
    with emulated(90) as driver, forced(path):
        first = run(case, "triton")
        launched = list(driver.launched)
        driver.launched.clear()
        with mock.patch.object(launcher, "start", side_effect=AssertionError("Triton's own path")):
            again = run(case, "triton")
    assert driver.launched == launched
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
