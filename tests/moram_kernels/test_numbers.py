"""The error budget: the torch backend rounds no worse than twice the plain run in each dtype.

The plain run is the reference backend in the same dtype, the truth the reference in float64 on the
same numbers. Tokens whose selection rounding could change are left out (`keep_separated`): both
backends score in float32, where a margin of 1e-3 of the norm is far above any rounding.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import (
    DTYPE_NAMES,
    LEAVES,
    assert_within_budget,
    keep_separated,
    laid_out,
    make_case,
    run,
    take_large_routes,
    with_spare_rows,
)

from moram_kernels import SelfActivation, retrieve, torch_backend

LOW = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, frozen and current atoms, input and output width.
SHAPES = [
    (1, 1, 0, 1, 1),
    (3, 2, 1, 7, 5),
    (17, 0, 8, 16, 11),
    (63, 13, 4, 96, 40),
    (64, 32, 8, 64, 64),
    (96, 33, 8, 64, 64),
    (67, 120, 8, 48, 24),
    (90, 300, 8, 64, 72),
    (70, 530, 0, 32, 16),
]


def shape_id(shape):
    tokens, frozen, current, width, out = shape
    return f"M{tokens}-N{frozen + current}-D{width}-O{out}"


def separated_case(shape, dtype, seed=0, **settings):
    tokens, frozen, current, width, out = shape
    # Many rows are dropped where the bank is large, because neighbours are close there.
    drawn = tokens * (20 if frozen + current > 100 else 4) + 50
    case = make_case(seed, (drawn,), frozen, current, width, out, dtype=dtype, **settings)
    return keep_separated(case, tokens)


def separated_cases(shape, dtype, **settings):
    """Enough cases for 128 tokens, and for 512 where a case has but a few.

    There the largest error is that of one ill-conditioned token: a budget that compares maxima
    needs enough of them on both sides.
    """
    tokens = 512 if shape[0] < 8 else 128
    count = min(171, -(-tokens // shape[0]))
    return [separated_case(shape, dtype, i, **settings) for i in range(count)]


def check_budget(cases, wanted=LEAVES, around=nullcontext):
    """The budget holds for the output and every gradient, each pooled over the cases.

    Pooled because in one small case a few roundings decide, on both sides of the comparison. The
    torch backend runs, forward and backward, inside the context manager `around`.
    """
    runs = {"actual": [], "low": [], "high": []}
    for case in cases:
        exact = case.without_spare_rows()
        with around():
            runs["actual"].append(run(case, "torch", wanted))
        runs["low"].append(run(exact, "reference", wanted))
        runs["high"].append(run(exact.to(torch.float64), "reference", wanted))
    for name in runs["high"][0]:
        pooled = {k: torch.cat([r[name].flatten() for r in runs[k]]) for k in runs}
        try:
            assert_within_budget(**pooled)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
class TestBudget:
    """Output and every gradient, in three precisions."""

    @pytest.mark.parametrize("top_k, temperature", [(1, 0.3), (8, 0.3), (8, 0.03)])
    def test_training(self, shape, dtype, top_k, temperature):
        check_budget(separated_cases(shape, dtype, top_k=top_k, temperature=temperature))

    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
    @pytest.mark.parametrize("threshold", [0.0, 0.2])
    def test_inference(self, shape, dtype, threshold, residual):
        settings = {"training": False, "threshold": threshold, "residual": residual}
        check_budget(separated_cases(shape, dtype, temperature=0.1, **settings))

    def test_spare_rows_and_odd_layouts(self, shape, dtype):
        check_budget([self.odd(with_spare_rows(c, 5)) for c in separated_cases(shape, dtype)])

    def odd(self, case):
        names = ("x", "keys", "values", "grad")
        return replace(case, **{n: laid_out(getattr(case, n), "strided") for n in names})


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_x_and_bank_may_differ_in_dtype(shape, dtype):
    bank_dtype = torch.bfloat16 if dtype == torch.float32 else torch.float32
    # Numbers that both dtypes hold, so that only the dtypes of the tensors differ.
    common = torch.float16 if dtype == torch.float16 else torch.bfloat16

    def mix(case):
        names = ("keys", "values", "current_keys", "current_values")
        bank = {n: getattr(case, n) for n in names if getattr(case, n) is not None}
        return replace(case.to(dtype), **{n: t.to(bank_dtype) for n, t in bank.items()})

    mixed = [mix(case) for case in separated_cases(shape, common)]
    check_budget(mixed)
    # The output takes the residual's dtype, and x's where there is none.
    wide = [replace(c, residual=c.residual.float(), grad=c.grad.float()) for c in mixed]
    check_budget(wide)
    assert run(wide[0], "torch")["output"].dtype == torch.float32
    bare = [replace(c, residual=None) for c in mixed]
    check_budget(bare)
    assert run(bare[0], "torch")["output"].dtype == dtype


@pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("shape", [(1, *s[1:]) for s in SHAPES], ids=shape_id)
def test_single_token_inference(shape, dtype):
    for threshold in (0.0, 0.2):
        for residual in (True, False):
            settings = {"training": False, "threshold": threshold, "residual": residual}
            with torch.no_grad():
                check_budget(separated_cases(shape, dtype, **settings), wanted=())


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("frozen", [0, 20, 100], ids=lambda n: f"N{n}")
def test_forward_and_backward_inside_autocast(frozen):
    cases = separated_cases((40, frozen, 4, 16, 8), torch.float32)
    check_budget(cases, around=partial(torch.autocast, "cpu", torch.bfloat16))


@pytest.mark.parametrize("width", [16, 80])
@pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
def test_gram_and_blocks(dtype, width, monkeypatch):
    take_large_routes(monkeypatch)
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", 0)
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 1)
    check_budget([separated_case((200, 60, 8, width, 24), dtype, i) for i in range(3)])


@pytest.mark.parametrize("frozen", [250, 500], ids=lambda n: f"N{n + 8}")
@pytest.mark.parametrize("width", [512, 768, 2048], ids=lambda d: f"D{d}")
def test_widths_of_real_layers(width, frozen):
    shape = (300, frozen, 8, width, 64)
    check_budget([separated_case(shape, torch.float32, i, temperature=0.03) for i in range(2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("tokens", [1, 4, 200])
@pytest.mark.usefixtures("route")
def test_ties_in_half_precision(tokens, dtype):
    # Integers: scores are exact in float32, so both backends see the same ties.
    for frozen in (20, 100):
        settings = {"top_k": 4, "integers": True, "dtype": dtype}
        check_budget([make_case(i, (tokens,), frozen, 6, 5, 7, **settings) for i in range(8)])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
def test_scale_of_the_input(scale):
    for frozen in (12, 120):
        cases = separated_cases((80, frozen, 4, 24, 16), torch.float32)
        check_budget([replace(case, x=case.x * scale) for case in cases])


class TestTheBudgetItself:
    """A gate that cannot close is none."""

    def results(self, dtype=torch.float32):
        high = torch.linspace(-3.0, 5.0, 1001, dtype=torch.float64)
        return high.to(dtype), high

    @pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
    def test_accepts_the_plain_run_and_a_last_bit(self, dtype):
        low, high = self.results(dtype)
        assert_within_budget(low, low, high)
        assert_within_budget(low * (1 + torch.finfo(dtype).eps / 2), low, high)

    @pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
    def test_rejects_one_wrong_element(self, dtype):
        low, high = self.results(dtype)
        wrong = low.clone()
        wrong[500] += 5 * 4 * torch.finfo(dtype).eps
        with pytest.raises(AssertionError, match="max error"):
            assert_within_budget(wrong, low, high)

    @pytest.mark.parametrize("dtype", LOW, ids=DTYPE_NAMES.get)
    def test_rejects_a_drift_that_no_single_element_shows(self, dtype):
        low, high = self.results(dtype)
        # Up to 5 the largest error may be 9 steps of 1, their root mean square about 4.
        drift = low + 5 * torch.finfo(dtype).eps
        with pytest.raises(AssertionError, match="rms error"):
            assert_within_budget(drift, low, high)

    def test_rejects_nan_and_a_lower_precision(self):
        low, high = self.results()
        with pytest.raises(AssertionError, match="max error nan"):
            assert_within_budget(torch.full_like(low, float("nan")), low, high)
        with pytest.raises(AssertionError):
            assert_within_budget(low.bfloat16(), low, high)
        with pytest.raises(AssertionError, match="max error"):
            assert_within_budget(low.bfloat16().float(), low, high)

    def test_rejects_anything_but_zero_where_the_result_is_zero(self):
        zero = torch.zeros(3)
        assert_within_budget(zero, zero, zero.double())
        with pytest.raises(AssertionError, match="max error"):
            assert_within_budget(zero + 1e-30, zero, zero.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("path", ["reference", "dense", "gather", "one token"])
def test_value_that_is_not_finite_reaches_all_tokens_where_all_are_multiplied(
    path, bad, monkeypatch
):
    if path == "gather":
        take_large_routes(monkeypatch)
    # Tokens select the atom of their own number alone.
    x, values = torch.eye(4, 32), torch.ones(32, 6)
    values[3, 2] = bad
    backend = "reference" if path == "reference" else "torch"
    tokens = x.split(1) if path == "one token" else [x]
    with torch.no_grad():
        out = [
            retrieve(t, torch.eye(32), values, SelfActivation(1), backend=backend) for t in tokens
        ]
    expected = torch.ones(4, 6, dtype=torch.bool)
    expected[slice(3, 4) if path in ("gather", "one token") else slice(None), 2] = False
    assert torch.equal(torch.cat(out).isfinite(), expected)
