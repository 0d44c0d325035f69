"""The interpreter as the other tests need it: bfloat16 is right and a forgotten tf32 is seen."""

import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
import triton
import triton.language as tl

from moram_kernels.triton_backend import available, launcher


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(out_ptr + offs, product)


@triton.jit
def _forgetful_kernel(a_ptr, b_ptr, out_ptr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


def operands(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2)]


def multiply(a, b, precision):
    out = torch.empty(16, 16)
    _product_kernel[(1,)](a, b, out, precision)
    return out


def error(out, a, b):
    """The largest error of a product in units of float32 roundings of its terms."""
    a, b = a.double(), b.double()
    return ((out - a @ b).abs() / (a.abs() @ b.abs())).max().item() * 2**24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_products_are_exact_to_a_float32_sum(dtype):
    a, b = operands(dtype)
    assert error(multiply(a, b, "ieee"), a, b) < 4
    assert not interpreter.products, "only products of float32 have a precision"


@pytest.mark.parametrize("precision", ["ieee", "bf16x6"])
def test_float32_products_are_exact_to_a_few_roundings(precision):
    a, b = operands(torch.float32)
    assert error(multiply(a, b, precision), a, b) < 4
    assert interpreter.products == {precision: 1}


def test_bf16x3_errs_by_more_than_a_few_roundings():
    a, b = operands(torch.float32)
    assert 4 < error(multiply(a, b, "bf16x3"), a, b) < 1000


def test_bf16x6_is_emulated_rather_than_taken_for_exact():
    a, b = operands(torch.float32)
    assert not torch.equal(multiply(a, b, "bf16x6"), multiply(a, b, "ieee"))


def test_infinite_operand_of_bf16x6_gives_infinity_in_its_row_alone():
    a, b = operands(torch.float32)
    a[3, 5], b[:] = float("inf"), b.abs()
    clean, out = a.clone(), multiply(a, b, "bf16x6")
    clean[3] = 1.0
    others = torch.arange(16) != 3
    assert (out[3] == float("inf")).all()
    assert torch.equal(out[others], multiply(clean, b, "bf16x6")[others])


@pytest.mark.parametrize("forgotten", [True, False], ids=["default", "named"])
def test_tf32_is_counted_and_wrong_by_thousands_of_roundings(forgotten):
    a, b = operands(torch.float32)
    out = torch.empty(16, 16)
    if forgotten:
        _forgetful_kernel[(1,)](a, b, out)
    else:
        out = multiply(a, b, "tf32")
    counted = interpreter.products.pop("tf32")
    assert counted == 1
    assert error(out, a, b) > 1000


def test_tf32_keeps_ten_bits_and_rounds_to_even():
    step = 2.0**-10
    given = torch.tensor([1 + step, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3.0, 0.0])
    expected = torch.tensor([1 + step, 1, 1 + 2 * step, 1 + step, -3.0, 0.0])
    assert torch.equal(torch.from_numpy(interpreter.to_tf32(given.numpy())), expected)


def test_casts_to_bfloat16_round_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=generator) * 10.0 ** torch.arange(-40, 24).repeat(16)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, 1 + 2**-8]
    x[:8] = torch.tensor(special)
    low, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    _cast_kernel[(1,)](x, low, 1024)
    _cast_kernel[(1,)](low, back, 1024)
    torch.testing.assert_close(low, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_library_takes_bfloat16_here():
    assert available.why_not() is None and launcher.interprets_bfloat16()


REFUSED = """
import functools
import torch
from moram_kernels import SelfActivation, fused_ops, retrieve
x, keys = torch.randn(3, 8), torch.randn(5, 8)
args = SelfActivation(2)
retrieve(x, keys, keys, args, backend="triton")
retrieve(x, keys, keys, args, backend="triton", precision="bf16x6")
plan, half = fused_ops.plan, x.half().requires_grad_()
fused_ops.plan = functools.partial(plan, path="split-gather")
retrieve(half, keys.half(), keys.half(), args, backend="triton").sum().backward()
fused_ops.plan = plan
retrieve(x.half(), keys.half(), keys.half(), args, backend="triton")
try:
    retrieve(x.bfloat16(), keys.bfloat16(), keys.bfloat16(), args, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_the_mend_bfloat16_is_refused_in_a_sentence():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = (
        'backend="triton" cannot run: Triton\'s interpreter multiplies bfloat16 wrongly; '
        "use float16 or float32\n"
    )
    assert done.stdout == expected
