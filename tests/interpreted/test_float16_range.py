"""float16 has 5 bits of exponent; what lies between inputs and results must not be held to them."""

from dataclasses import replace

import pytest
import torch
from paths import TRAINED, run_training
from support import assert_within_budget, keep_separated, make_case, run

F16, F64 = torch.float16, torch.float64
# Factors of (x, keys, values, grad).
RANGES = {
    "gradients of 1e-6": (1, 8, 1, 2e-6),
    "weighted scores of 1e6": (300, 600, 1e-4, 0.01),
    "weighted scores of 1e-6": (1e-3, 1e-3, 1e3, 1e-3),
    "gradients of scores of 1e6": (0.01, 0.01, 300, 300),
}


@pytest.mark.parametrize("factors", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("path", TRAINED)
def test_float16_is_as_exact_as_in_torch_whatever_the_range(path, factors):
    x, keys, values, grad = factors
    case = make_case(3, (60,), 40, 8, 64, 64, top_k=4, residual=False)
    case = replace(
        case,
        x=case.x * x,
        grad=case.grad * grad,
        keys=case.keys * keys,
        current_keys=case.current_keys * keys,
        values=case.values * values,
        current_values=case.current_values * values,
    )
    case = keep_separated(case.to(F16), 20)
    high, low = run(case.to(F64), "reference"), run(case, "torch")
    actual, _ = run_training(case, path)
    for name, tensor in high.items():
        assert tensor.abs().max() < torch.finfo(F16).max, name
        assert_within_budget(actual[name], low[name], tensor)
