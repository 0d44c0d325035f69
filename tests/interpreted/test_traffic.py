"""Bytes per tensor of the forward: kernels move what the formulas of `moves.py` say, no more."""

from dataclasses import replace

import pytest
import torch
from moves import (
    ALL_OF_TWO_TILES,
    CURRENT,
    EVEN,
    EVEN_HALF,
    FEW,
    FEW_ODD,
    FROZEN,
    ODD,
    ODD_BANK,
    ODD_HALF,
    ONE_TILE,
    TWO_TILES,
    WIDE,
    check,
    check_aggregate,
    check_gather,
    check_scores,
    measure,
    named,
    once,
    picked_segments,
    segments,
    table_of,
    tiles,
    times,
)

from moram_kernels.triton_backend import plan


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "shape", [EVEN, EVEN_HALF, TWO_TILES, ALL_OF_TWO_TILES, ODD_BANK, FROZEN, CURRENT], ids=str
)
def test_the_resident_forward_moves_the_minimum(shape, training, residual, monkeypatch):
    seen = measure(monkeypatch, shape, "resident", training, residual)
    (launch,) = named(seen.forward, "_resident_kernel")
    assert (launch.meta["BLOCK_N2"] > 0) == (shape.atoms > 64)
    m, s = shape.tokens, shape.itemsize
    count = tiles(launch, m, "BLOCK_M")
    reads = {
        "x": once(m, shape.width, s),
        **segments(("keys", "current_keys"), shape, count, shape.width),
        **segments(("values", "current_values"), shape, count, shape.out),
    }
    writes = {"out": once(m, shape.out, s)}
    if residual:
        reads["residual"] = once(m, shape.out, s)
    if training:
        writes |= {"scores": once(m, shape.atoms, 4), "stats": once(4, m, 4)}
    check(launch, shape, reads, writes)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", [EVEN, EVEN_HALF, ODD, ODD_HALF, FROZEN, CURRENT], ids=str)
def test_the_dense_split_forward_moves_the_minimum(shape, training, monkeypatch):
    seen = measure(monkeypatch, shape, "split-dense", training)
    kernels = named(seen.forward, "_score_kernel", "_select_kernel", "_aggregate_kernel")
    score, select, aggregate = kernels
    check_scores(score, shape, shape.atoms, shape.width, table_of(shape, shape.width))
    writes = {"written": once(shape.tokens, shape.atoms, shape.itemsize)}
    if training:
        writes["stats"] = once(4, shape.tokens, 4)
    if shape.scaled:
        writes["unscale"] = once(shape.tokens, 4)
    check(select, shape, {"scores": once(shape.tokens, shape.atoms, 4)}, writes)
    check_aggregate(aggregate, shape, shape.out, True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", [EVEN, ONE_TILE, ODD, ODD_HALF, FROZEN, CURRENT], ids=str)
def test_the_gathering_forward_reads_what_fires(shape, training, monkeypatch):
    seen = measure(monkeypatch, shape, "split-gather", training)
    score, select, gather = named(seen.forward, "_score_kernel", "_select_kernel", "_gather_kernel")
    check_scores(score, shape, shape.atoms, shape.width, table_of(shape, shape.width))
    m, k = shape.tokens, shape.top_k
    writes = {name: once(m, k, 4) for name in ("index", "written", "picked")}
    if training:
        writes |= {"current": once(m, shape.current, 4), "stats": once(4, m, 4)}
    check(select, shape, {"scores": once(m, shape.atoms, 4)}, writes)
    check_gather(
        gather, shape, shape.out, seen.fired, {"residual": once(m, shape.out, shape.itemsize)}
    )
    silent = (seen.selected & ~seen.fired).any().item()
    assert silent != training, "the threshold must silence some atoms, in inference only"


@pytest.mark.parametrize("threshold", [True, False], ids=["threshold", "all-fire"])
@pytest.mark.parametrize("shape", [FEW, replace(FEW, dtype=torch.float16), FEW_ODD], ids=str)
def test_decode_reads_the_values_that_fire(shape, threshold, monkeypatch):
    seen = measure(monkeypatch, shape, "decode", False, threshold=0.2 * threshold)
    score, decode = named(seen.forward, "_score_kernel", "_decode_kernel")
    m, splits = shape.tokens, score.grid[2]
    assert (splits > 1) == (shape.width >= 512)
    check_scores(score, shape, shape.atoms, shape.width, table_of(shape, shape.width), splits)
    reads = {
        "partial": times(tiles(decode, shape.out, "BLOCK_O"), splits, m, shape.atoms, 4),
        "residual": once(m, shape.out, shape.itemsize),
        **picked_segments(("frozen", "current"), shape, seen.fired, shape.out),
    }
    check(decode, shape, reads, {"out": once(m, shape.out, shape.itemsize)})
    assert (seen.selected & ~seen.fired).any().item() == threshold


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_selection_by_groups_reads_what_it_must(fused, training, monkeypatch):
    how = "fused" if fused else "apart"
    monkeypatch.setattr(plan.cost, "groups", lambda *args: how)
    shape = WIDE
    plan._plan.cache_clear()
    seen = measure(monkeypatch, shape, "split-gather", training)
    plan._plan.cache_clear()
    score, group, gather = named(seen.forward, "_score_kernel", "_group_kernel", "_gather_kernel")
    m, k, groups = shape.tokens, shape.top_k, -(-shape.atoms // 32)
    of_groups = {name: once(m, groups, 4) for name in ("maxima", "squares")}
    table = table_of(shape, shape.width)
    check_scores(score, shape, shape.atoms, shape.width, table, groups=of_groups if fused else {})
    # All atoms of the top_k groups, and in training the current ones, which are the last.
    read = in_top_groups(seen.scores, k)
    total = read.sum().item() + (m * shape.current if training else 0)
    if training:
        read[:, shape.frozen :] = True
    if not fused:
        read[:], total = True, total + m * shape.atoms
    # A group's number lies for a moment where an atom's is wanted.
    reads = {"scores": (4 * read.sum().item(), 4 * total), "index": once(m, k, 4), **of_groups}
    if not fused:
        del reads["squares"]
    writes = {name: once(m, k, 4) for name in ("written", "picked")}
    writes["index"] = times(2, m, k, 4)
    if not fused:
        writes["maxima"] = of_groups["maxima"]
    if training:
        # Of the stats only the norm.
        writes |= {"current": once(m, shape.current, 4), "stats": once(m, 4)}
    check(group, shape, reads, writes, ["stats"])
    check_gather(gather, shape, shape.out, seen.fired, {"residual": once(m, shape.out, 4)})


def in_top_groups(scores, top_k):
    """Which atoms [M, N] are in the top_k groups of 32 with the largest scores."""
    atoms = scores.shape[1]
    group = torch.arange(atoms) // 32
    maxima = torch.stack([scores[:, group == g].amax(-1) for g in range(int(group[-1]) + 1)], 1)
    border = maxima.sort(descending=True).values[:, top_k - 1 : top_k]
    return (maxima >= border)[:, group]
