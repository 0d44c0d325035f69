"""Bytes per tensor of the backward: kernels move what the formulas of `moves.py` say, no more."""

import pytest
import torch
from moves import (
    CURRENT,
    EVEN,
    EVEN_HALF,
    FROZEN,
    ODD,
    ODD_BANK,
    ODD_HALF,
    ONE_TILE,
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


@pytest.mark.parametrize("path", ["resident", "split-dense"])
@pytest.mark.parametrize("shape", [EVEN, EVEN_HALF, ODD, FROZEN, CURRENT], ids=str)
def test_the_dense_backward_moves_the_minimum(shape, path, monkeypatch):
    shape = ODD_BANK if shape is ODD and path == "resident" else shape
    seen = measure(monkeypatch, shape, path, True, backward=True)
    score, rows, aggregate, *bank = seen.backward
    named([score, rows, aggregate], "_score_kernel", "_rows_backward_kernel", "_aggregate_kernel")
    m, s = shape.tokens, shape.itemsize
    check_scores(score, shape, shape.atoms, shape.out, table_of(shape, shape.out))
    reads = {
        "scores": once(m, shape.atoms, 4),
        "pull": once(m, shape.atoms, 4),
        "stats": once(4, m, 4),
    }
    own = once(m, shape.current, shape.summed)
    writes = {"dscores": once(m, shape.atoms, s), "written": own}
    if shape.scaled:
        writes |= {"unscale": once(m, 4), "own": own}
    check(rows, shape, reads, writes)
    check_aggregate(aggregate, shape, shape.width, False)
    check_bank(bank, shape)


def check_bank(launches, shape):
    m, s, c, summed = shape.tokens, shape.itemsize, shape.current, shape.summed
    if not c:
        assert not launches
        return
    bank, *rest = launches
    splits = bank.grid[2]
    named(launches, "_bank_gradient_kernel", *["_sum_splits_kernel"] * (splits > 1))
    atoms = tiles(bank, c, "BLOCK_A")
    reads = {
        "dscores": times(tiles(bank, shape.width, "BLOCK_B"), m, c, summed),
        "written": times(tiles(bank, shape.out, "BLOCK_B"), m, c, summed),
        "x": times(atoms, m, shape.width, s),
        "grad": times(atoms, m, shape.out, s),
    }
    size = c * (shape.width + shape.out)
    check(bank, shape, reads, {"out": once(splits, size, 4 if splits > 1 else s)})
    for launch in rest:
        check(launch, shape, {"partial": once(splits, size, 4)}, {"out": once(size, s)})


@pytest.mark.parametrize("shape", [EVEN, ONE_TILE, ODD, ODD_HALF, FROZEN, CURRENT], ids=str)
def test_the_backward_from_lists_moves_the_minimum(shape, monkeypatch):
    seen = measure(monkeypatch, shape, "split-gather", True, backward=True)
    lists, gram, score, gather, *bank = seen.backward
    names = ("_lists_backward_kernel", "_gram_kernel", "_score_kernel", "_gather_kernel")
    named([lists, gram, score, gather], *names)
    m, d, s, k, c = shape.tokens, shape.width, shape.itemsize, shape.top_k, shape.current
    reads = {
        "index": once(m, k, 4),
        "picked": once(m, k, 4),
        "stats": once(m, 4),
        "current": once(m, c, 4),
        "grad": once(m, shape.out, s),
        **picked_segments(("frozen", "current_values"), shape, seen.selected, shape.out),
    }
    writes = {
        "dlist": once(m, k, 4),
        "factor": once(m, 4),
        "dscores": once(m, c, shape.summed),
        "written": once(m, c, shape.summed),
    }
    check(lists, shape, reads, writes, ["stats", "factor"])
    both = tiles(gram, d, "BLOCK_A") + tiles(gram, d, "BLOCK_B")
    keys = segments(("frozen", "current"), shape, both, d)
    # Squares can overflow float16.
    square = 2 if shape.dtype == torch.bfloat16 else 4
    check(gram, shape, keys, {"out": once(d, d, square)})
    check_scores(score, shape, d, d, lambda count: {"frozen": times(count, d, d, square)})
    extra = {"extra": once(m, d, 4), "factor": times(tiles(gather, d, "BLOCK_O"), m, 4)}
    check_gather(gather, shape, d, seen.selected, extra)
    check_bank(bank, shape)
