"""Kernels that are products and sums, each alone: scores, aggregate, gather, bank gradient, Gram.

Outputs lie inside buffers of a value that must still surround them afterwards.
"""

import interpreter
import pytest
import torch
import triton
from oracle import assert_product
from paths import piece_table, within
from support import assert_within_budget

from moram_kernels.triton_backend.aggregate import launch_aggregate, launch_gather
from moram_kernels.triton_backend.outer import launch_bank_gradient, launch_gram
from moram_kernels.triton_backend.scores import launch_scores
from moram_kernels.triton_backend.segments import Table

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (of the left operand, of the table)
PAIRS = pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)], ids=str
)
MIXED = pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16)], ids=str)
LAUNCH = {"num_warps": 4, "num_stages": 1}
SCORES = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 32, **LAUNCH}
AGGREGATE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_O": 32, **LAUNCH}
BANK = {"BLOCK_M": 16, "BLOCK_A": 16, "BLOCK_B": 32, **LAUNCH}
GRAM = {"BLOCK_N": 16, "BLOCK_A": 16, "BLOCK_B": 32, **LAUNCH}


def draw(*shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def table_of(rows):
    return Table.of(rows, rows[:0])


@PAIRS
@pytest.mark.parametrize("size", [(1, 1, 0, 1), (17, 9, 8, 33), (5, 0, 17, 65), (20, 33, 0, 64)])
def test_scores_of_both_segments(size, dtypes):
    rows, frozen, current, width = size
    x, table = draw(rows, width, dtype=dtypes[0]), piece_table(frozen, current, width, dtypes[1])
    with within(rows, frozen + current) as out:
        launch_scores(x, table, out, "ieee", SCORES)
    assert_product(out, x, torch.cat([table.frozen, table.current]).T)


@pytest.mark.parametrize("width", [32, 33, 130])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_of_scores_are_sums_over_their_own_features(splits, width):
    x, table = draw(7, width), piece_table(9, 4, width, F32)
    keys = torch.cat([table.frozen, table.current])
    partial = torch.full((splits, 7, 13), float("nan"))
    launch_scores(x, table, partial, "ieee", SCORES, splits)
    step = triton.cdiv(triton.cdiv(width, splits), 32) * 32
    for split in range(splits):
        part = slice(split * step, (split + 1) * step)
        assert_product(partial[split], x[:, part], keys[:, part].T)


@MIXED
def test_scores_of_bfloat16_and_float32_are_exact_to_a_float32_sum(dtypes):
    x, table = draw(17, 65, dtype=dtypes[0]), piece_table(9, 8, 65, dtypes[1])
    with within(17, 17) as out:
        launch_scores(x, table, out, "bf16x6", SCORES)
    assert_product(out, x, torch.cat([table.frozen, table.current]).T)
    assert not interpreter.products, "the products are of bfloat16"


@MIXED
def test_no_bit_of_a_float32_number_is_lost_beside_a_bfloat16_one(dtypes):
    """One-hot rows pick single numbers out; from 2^-110 up each must come back as it was."""
    exponents = torch.arange(-110, 128)
    drawn = 2 - torch.rand(2, 238, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor([[1.0], [-1.0]]) * drawn.clamp(1, 2 - 2**-23) * 2.0**exponents
    assert numbers.isfinite().all() and (numbers.view(torch.int32) & 0xFF).any()
    wide, hot = numbers, torch.eye(238)
    if dtypes[0] == F32:
        found = torch.empty(2, 238)
        launch_scores(wide, table_of(hot.to(BF16)), found, "bf16x6", SCORES)
    else:
        found = torch.empty(238, 2)
        launch_scores(hot.to(BF16), table_of(wide), found, "bf16x6", SCORES)
        found = found.T
    assert torch.equal(found, numbers)


def test_bf16x6_scores_are_as_exact_as_a_float32_sum():
    x, table = draw(17, 65), piece_table(9, 8, 65, F32)
    with within(17, 17) as out:
        launch_scores(x, table, out, "bf16x6", SCORES)
    assert_product(out, x, torch.cat([table.frozen, table.current]).T)


@PAIRS
@pytest.mark.parametrize("residual", [None, BF16, F32, "out"], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 0, 1), (17, 9, 8, 33), (5, 0, 17, 64)])
def test_aggregate_adds_rows_to_the_residual(size, residual, dtypes):
    rows, frozen, current, width = size
    weights = draw(rows, frozen + current, dtype=dtypes[0])
    table = piece_table(frozen, current, width, dtypes[1])
    dtype = dtypes[0] if residual in (None, "out") else residual
    base = None if residual is None else draw(rows, width, dtype=dtype, seed=2)
    with within(rows, width, dtype) as out:
        if residual == "out":
            out.copy_(base)
        launch_aggregate(weights, table, out if residual == "out" else base, out, "ieee", AGGREGATE)
    assert_product(out, weights, torch.cat([table.frozen, table.current]), base)


@MIXED
def test_sums_of_rows_where_bfloat16_meets_float32_are_exact_to_a_float32_sum(dtypes):
    weights, table = draw(17, 17, dtype=dtypes[0]), piece_table(9, 8, 33, dtypes[1])
    with within(17, 33) as out:
        launch_aggregate(weights, table, None, out, "bf16x6", AGGREGATE)
    assert_product(out, weights, torch.cat([table.frozen, table.current]))
    assert not interpreter.products, "the products are of bfloat16"


def test_float32_sums_into_bfloat16_take_three_products():
    weights, table = draw(17, 17), piece_table(9, 8, 33, F32)
    with within(17, 33, BF16) as out:
        launch_aggregate(weights, table, None, out, "bf16x6", AGGREGATE)
    assert_product(out, weights, torch.cat([table.frozen, table.current]))
    assert set(interpreter.products) == {"bf16x3"}


@pytest.mark.parametrize("size", [(1, 1, 0, 1), (17, 9, 8, 33), (5, 0, 17, 64)])
def test_aggregate_takes_the_scale_off_float16_rows(size):
    rows, frozen, current, width = size
    weights, unscale = draw(rows, frozen + current, dtype=F16), 2.0 ** draw(rows, seed=5).round()
    table, base = piece_table(frozen, current, width, F16), draw(rows, width, seed=2)
    with within(rows, width) as out:
        launch_aggregate(weights, table, base, out, "ieee", AGGREGATE, unscale)
    keys = torch.cat([table.frozen, table.current])
    assert_product(out, weights * unscale[:, None], keys, base)


def lists(rows, top_k, num_atoms):
    generator = torch.Generator().manual_seed(rows + top_k)
    drawn = [torch.randperm(num_atoms, generator=generator)[:top_k] for _ in range(rows)]
    return torch.stack(drawn).sort(-1).values.to(torch.int32)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "extra"])
@pytest.mark.parametrize("size", [(1, 1, 1, 0, 1), (7, 3, 9, 8, 33), (5, 4, 0, 17, 65)])
def test_gather_adds_listed_rows_to_the_residual(size, extra, dtype):
    rows, top_k, frozen, current, width = size
    index = lists(rows, top_k, frozen + current)
    weights, table = draw(rows, top_k), piece_table(frozen, current, width, dtype)
    base, factor = draw(rows, width, dtype=dtype, seed=2), draw(rows, seed=3)
    more = (draw(rows, width, seed=4), factor) if extra else ()
    with within(rows, width, dtype) as out:
        launch_gather(index, weights, table, base, out, *more)
    dense = torch.zeros(rows, frozen + current).scatter(1, index.long(), weights)
    left, right = dense, torch.cat([table.frozen, table.current]).float()
    if extra:
        # Every row has its own extra: one more column of weights each.
        left, right = torch.cat([left, -factor.diag()], 1), torch.cat([right, more[0]])
    assert_product(out, left, right, base)


def test_gather_does_not_read_rows_of_weight_zero():
    table = piece_table(5, 0, 16, F32)
    table.frozen[2:] = float("nan")
    index, weights = torch.tensor([[0, 1, 3]], dtype=torch.int32), torch.tensor([[1.0, 2.0, 0.0]])
    out = torch.empty(1, 16)
    launch_gather(index, weights, table, None, out)
    assert torch.equal(out[0], table.frozen[0] + 2 * table.frozen[1])


@PAIRS
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (40, 5, 33, 31)])
def test_bank_gradient_sums_outer_products_over_tokens(size, splits, dtypes):
    rows, current, width, out = size
    dscores, written = (draw(rows, current, dtype=dtypes[0], seed=s) for s in (1, 2))
    x, grad = draw(rows, width, dtype=dtypes[1]), draw(rows, out, dtype=dtypes[1], seed=4)
    args = (dscores, x, written, grad, dtypes[1], "ieee", BANK, splits)
    dkeys, dvalues = launch_bank_gradient(*args)
    assert dkeys.dtype == dvalues.dtype == dtypes[1]
    assert_product(dkeys, dscores.T, x)
    assert_product(dvalues, written.T, grad)
    again = launch_bank_gradient(*args)
    assert torch.equal(dkeys, again[0]) and torch.equal(dvalues, again[1])


@MIXED
def test_bank_gradient_where_bfloat16_meets_float32_is_exact_to_a_float32_sum(dtypes):
    dscores, written = (draw(40, 5, dtype=dtypes[0], seed=s) for s in (1, 2))
    x, grad = draw(40, 33, dtype=dtypes[1]), draw(40, 31, dtype=dtypes[1], seed=4)
    dkeys, dvalues = launch_bank_gradient(dscores, x, written, grad, F32, "bf16x6", BANK, 2)
    assert_product(dkeys, dscores.T, x)
    assert_product(dvalues, written.T, grad)
    assert not interpreter.products, "the products are of bfloat16"


def test_bank_gradient_of_float16_takes_factors_beyond_its_range():
    far = 2.0 ** torch.arange(-30, 30, 12)
    dscores, written = draw(40, 5, seed=1) * far, draw(40, 5, seed=2) * far.flip(0)
    x, grad = (2.0**-12 * draw(40, n, seed=n) for n in (33, 31))
    x, grad = x.to(F16), grad.to(F16)
    found = launch_bank_gradient(dscores, x, written, grad, F16, "ieee", BANK, 2)
    for actual, factors, rows in zip(found, (dscores, written), (x, grad), strict=True):
        high, low = factors.double().T @ rows.double(), factors.T @ rows.float()
        for atom in range(5):
            assert high[atom].abs().max() < torch.finfo(F16).max
            assert_within_budget(actual[atom], low[atom].to(F16), high[atom])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [(1, 0, 1), (9, 8, 33), (0, 17, 65), (40, 0, 32)])
def test_gram_is_the_keys_squared(size, dtype):
    table = piece_table(*size, dtype)
    keys = torch.cat([table.frozen, table.current])
    out = torch.full((size[2], size[2]), float("nan"), dtype=dtype)
    launch_gram(table, out, "ieee", GRAM)
    assert_product(out, keys.T, keys)
