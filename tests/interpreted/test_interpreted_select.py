"""Kernels that select, each alone: select, select_groups, decode and the sorting networks.

They are given scores, which are then exact: the keys of the oracle's case are the identity. So the
selection has to be the stable one, and with values that are the identity the output of the oracle
is the weighted score of every atom.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from oracle import check_selection, check_values, kept_above, kept_in_lists, stable_top
from paths import piece_table
from support import make_case

from moram_kernels.aliases import Rule
from moram_kernels.triton_backend import networks, select_groups
from moram_kernels.triton_backend.decode import launch_decode
from moram_kernels.triton_backend.select import launch_select
from moram_kernels.triton_backend.tiles import TILES

NAN = float("nan")
F32, BF16 = torch.float32, torch.bfloat16


def scored(rows, num_atoms, top_k, *, temperature=0.1, threshold=0.15, seed=0, **more):
    """A case whose x are the scores and whose values show every atom's weighted score."""
    case = make_case(
        seed, (rows,), num_atoms, 0, num_atoms, num_atoms, top_k=top_k, temperature=temperature,
        threshold=threshold, residual=False, dtype=F32, **more,
    )  # fmt: skip
    # Some rows of exact ties, one row of zeros alone.
    case.x[1::3] = case.x[1::3].round()
    case.x[2::5] = 0
    return replace(case, keys=torch.eye(num_atoms), values=torch.eye(num_atoms))


def rule_of(case):
    a = case.activation
    return Rule(a.top_k, a.temperature, 0.0 if case.training else a.threshold, a.eps)


def check_written(case, kept, written):
    tally = check_selection(case, kept, exact=True)
    check_values({"output": written}, case, kept)
    return tally


def check_stats(case, kept, stats):
    """norm, largest score, 1 / sum of the shares."""
    scores = case.x.double()
    norm = scores.norm(dim=-1)
    top = scores.amax(-1)
    scale = case.activation.temperature * norm.clamp_min(case.activation.eps)
    share = ((scores - top[:, None]) / scale[:, None]).exp() * kept
    assert torch.equal(stats[1].double(), top)
    torch.testing.assert_close(stats[0].double(), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[2].double(), 1 / share.sum(-1), rtol=1e-5, atol=0)


SIZES = [(1, 1, 1), (5, 5, 4), (7, 5, 8), (20, 33, 7), (20, 16, 16), (3, 17, 16), (3, 1030, 100)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dense_selection(size, training):
    case = scored(*size, training=training)
    rows, num_atoms, top_k = size
    written = torch.full((rows, num_atoms + 3), NAN)
    stats = torch.full((4, rows), NAN)
    wide = torch.full((rows, num_atoms + 2), NAN)
    wide[:, :num_atoms] = case.x
    launch_select(wide[:, :num_atoms], rule_of(case), written=written[:, :num_atoms], stats=stats)
    kept = kept_above(case.x, stats[3], min(top_k, num_atoms))
    check_written(case, kept, written[:, :num_atoms])
    check_stats(case, kept, stats)
    assert written[:, num_atoms:].isnan().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("frozen", [0, 3, None], ids=["current", "both", "frozen"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_selection_into_lists(size, frozen, training):
    case = scored(*size, training=training)
    rows, num_atoms, top_k = size
    count = min(top_k, num_atoms)
    index = torch.full((rows, count), -1, dtype=torch.int32)
    written, picked, stats = torch.full((2, rows, count), NAN), None, torch.full((4, rows), NAN)
    written, picked = written
    current = None
    if frozen is not None:
        frozen = min(frozen, num_atoms)
        current = (torch.full((rows, num_atoms - frozen), NAN), frozen)
    lists = (index, written, picked)
    launch_select(case.x, rule_of(case), lists=lists, current=current, stats=stats)
    check_lists(case, lists, current)
    check_stats(case, kept_in_lists(index, num_atoms), stats)


def check_lists(case, lists, current):
    index, written, picked = lists
    kept = kept_in_lists(index, case.x.shape[1])
    check_written(case, kept, torch.zeros_like(case.x).scatter(1, index.long(), written))
    assert torch.equal(picked, case.x.gather(1, index.long()))
    if current is not None:
        assert torch.equal(current[0], case.x[:, current[1] :])


def groups_of(scores):
    """(maxima, squares) of groups of 32 scores, as the kernel of the scores leaves them."""
    count = -(-scores.shape[1] // 32)
    padded = torch.nn.functional.pad(scores, (0, 32 * count - scores.shape[1]), value=NAN)
    parts = padded.view(len(scores), count, 32)
    lowest = torch.full_like(parts, -float("inf"))
    return parts.where(~parts.isnan(), lowest).amax(-1), parts.nan_to_num(0).square().sum(-1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(
    "size", [(3, 130, 4), (5, 128, 4), (3, 150, 5), (2, 2050, 16), (2, 993, 32)], ids=str
)
def test_selection_by_groups(size, fused, training):
    rows, num_atoms, top_k = size
    case = scored(*size, training=training)
    # The largest scores lie across the border of two groups, and in the last, short one.
    case.x[0, 60:70] = 9.0
    case.x[0, -1] = 9.0
    index = torch.full((rows, top_k), -1, dtype=torch.int32)
    lists = (index, *torch.full((2, rows, top_k), NAN))
    current = (torch.full((rows, num_atoms - 33), NAN), 33)
    stats = torch.full((4, rows), NAN)
    groups = groups_of(case.x) if fused else None
    select_groups.launch_select_groups(case.x, rule_of(case), lists, current, stats, groups)
    torch.testing.assert_close(stats[0].double(), case.x.double().norm(dim=-1), rtol=1e-6, atol=0)
    check_lists(case, lists, current)


@pytest.mark.parametrize("seed", range(4))
def test_ties_between_groups_go_to_the_lowest_index(seed):
    """Few values, so that most maxima of groups are equal, and most scores at the border."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 1 + seed, (4, 700), generator=generator).float()
    index = torch.full((4, 16), -1, dtype=torch.int32)
    lists = (index, *torch.full((2, 4, 16), NAN))
    select_groups.launch_select_groups(x, Rule(16, 0.1, 0.0, 1e-12), lists)
    assert torch.equal(kept_in_lists(index, 700), stable_top(x, 16))


def test_selection_from_a_large_bank():
    case = large(2, 8200, 8)
    index = torch.full((2, 8), -1, dtype=torch.int32)
    lists = (index, *torch.full((2, 2, 8), NAN))
    select_groups.launch_select_groups(case.x, rule_of(case), lists)
    kept = kept_in_lists(index, 8200)
    assert torch.equal(kept, stable_top(case.x, 8))
    assert torch.equal(lists[2], case.x[kept].view(2, 8))


def large(rows, num_atoms, top_k):
    case = make_case(0, (rows,), 1, 0, num_atoms, 1, top_k=top_k, dtype=F32, training=False)
    case.x[1] = case.x[1].round()
    return case


@pytest.mark.parametrize("kernel", ["select", "groups", "decode"])
def test_rows_that_are_not_finite_end_and_stay_alone(kernel):
    case = scored(8, 130, 4)
    spoiled = case.x.clone()
    spoiled[1], spoiled[2, 3], spoiled[3, 5] = NAN, NAN, float("inf")
    spoiled[4, 6], spoiled[5], spoiled[6, :3] = -float("inf"), float("inf"), NAN
    results = []
    for scores in (case.x, spoiled):
        if kernel == "decode":
            out = torch.empty(8, 130)
            table = piece_table(130, 0, 130, F32)
            launch_decode(scores[None].contiguous(), table, None, out, rule_of(case))
            results.append(out)
            continue
        index = torch.zeros(8, 4, dtype=torch.int32)
        lists = (index, torch.full((8, 4), NAN), torch.empty(8, 4))
        launch = launch_select if kernel == "select" else select_groups.launch_select_groups
        launch(scores, rule_of(case), lists=lists)
        results.append(lists[1])
    clean, poisoned = results
    assert not poisoned[1:7].isfinite().any()
    assert torch.equal(poisoned[[0, 7]], clean[[0, 7]]) and clean.isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["plain", "threshold"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "size", [(1, 1, 0, 1, 1), (5, 9, 8, 4, 33), (3, 0, 5, 8, 300), (3, 33, 0, 16, 65)], ids=str
)
def test_decode_selects_and_gathers(size, splits, dtype, training):
    rows, frozen, current, top_k, out = size
    case = scored(rows, frozen + current, top_k, training=training)
    table = piece_table(frozen, current, out, dtype)
    values = torch.cat([table.frozen, table.current]).float()
    # Halves and quarters add up without rounding.
    shares = [1.0] if splits == 1 else [0.25, 0.5, 0.25]
    partial = torch.stack([case.x * share for share in shares])
    residual = case.x.new_tensor(range(rows * out)).view(rows, out).to(dtype) / 8
    got = torch.full((rows, out), NAN, dtype=dtype)
    launch_decode(partial, table, residual, got, rule_of(case))
    kept = stable_top(case.x, min(top_k, frozen + current))
    case = replace(case, values=values, residual=residual, grad=torch.zeros(rows, out))
    check_values({"output": got}, case, kept)


@triton.jit
def _network_kernel(
    x_ptr, out_ptr, NETWORK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    offs_m = tl.arange(0, 16)[:, None] * (FIRST + SECOND)
    x = tl.load(x_ptr + offs_m + tl.arange(0, FIRST)[None, :])
    if SECOND > 0:
        x2 = tl.load(x_ptr + offs_m + FIRST + tl.arange(0, SECOND)[None, :])
        value, top = NETWORK(x, x2, 16)
    else:
        value, top = NETWORK(x, 16)
    tl.store(out_ptr + tl.arange(0, 16), value)
    tl.store(out_ptr + 16 + tl.arange(0, 16), top)


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("top_k", networks.TOP_K)
@pytest.mark.parametrize("pair", TILES, ids=str)
def test_network_finds_the_border_and_the_top(pair, top_k, target):
    generator = torch.Generator().manual_seed(top_k)
    x = torch.randn(16, sum(pair), generator=generator)
    x[0], x[1] = x[0].sort().values, x[1].sort(descending=True).values
    x[2], x[3] = x[2].round(), 0
    x[4, top_k:], x[5, : sum(pair) - top_k - 1] = float("-inf"), float("-inf")
    x[6] = torch.arange(sum(pair)).roll(7)
    out = torch.full((2, 16), NAN)
    tiles = pair if pair[1] else pair[:1]
    _network_kernel[(1,)](x, out, networks.network(tiles, top_k, target), *pair)
    ordered = x.sort(descending=True).values
    assert torch.equal(out[0], ordered[:, top_k - 1]) and torch.equal(out[1], ordered[:, 0])


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_comparators_sort_every_order_of_zeros_and_ones(size):
    pairs = networks.sorting_network(size)
    rows = torch.arange(2**size)[:, None] >> torch.arange(size) & 1
    for i, j in pairs:
        rows[:, [i, j]] = rows[:, [i, j]].sort(descending=True).values
    assert (rows[:, :-1] >= rows[:, 1:]).all()
