"""The resident kernel alone, for every pair of tiles that the plan offers."""

from dataclasses import replace

import pytest
import torch
from oracle import check_selection, check_values, kept_above, live
from support import make_case

from moram_kernels.aliases import Rule
from moram_kernels.triton_backend.resident import launch_resident
from moram_kernels.triton_backend.segments import Table
from moram_kernels.triton_backend.tiles import TILES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
ROWS, WIDTH = 19, 64


def resident(case, pair, *, precision="ieee", save=True):
    """(output, selection or None) of one launch over two row tiles and two steps of D and O."""
    num_atoms = len(live(case)[0])
    a = case.activation
    out = torch.full((ROWS, WIDTH), NAN, dtype=case.x.dtype)
    saved = torch.full((ROWS, num_atoms + 3), NAN), torch.full((4, ROWS), NAN)
    config = {
        "BLOCK_M": 16, "BLOCK_N": pair[0], "BLOCK_N2": pair[1], "BLOCK_D": 32, "BLOCK_O": 32,
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    none = case.x.new_empty(0, WIDTH).to(case.keys.dtype)
    current = (
        (none, none) if case.current_keys is None else (case.current_keys, case.current_values)
    )
    launch_resident(
        case.x,
        Table.of(case.keys, current[0]),
        Table.of(case.values, current[1]),
        case.residual,
        out,
        Rule(a.top_k, a.temperature, 0.0 if case.training else a.threshold, a.eps),
        precision,
        config,
        saved if save else None,
    )
    if not save:
        return out, None
    scores, stats = saved
    assert scores[:, num_atoms:].isnan().all()
    return out, kept_above(scores[:, :num_atoms], stats[3], min(a.top_k, num_atoms))


def check_resident(case, pair, *, exact=False, precision="ieee"):
    out, kept = resident(case, pair, precision=precision)
    tally = check_selection(case, kept, exact=exact)
    check_values({"output": out}, case, kept)
    return out, tally


@pytest.mark.parametrize("top_k", [4, 8, 16, 256])
@pytest.mark.parametrize("pair", TILES, ids=str)
def test_every_tile_and_top_k(pair, top_k):
    full = sum(pair)
    # Odd and short of the tile for small top_k, full for large; a second tile is never empty.
    num_atoms = full - 3 if top_k < 16 else full
    current = {4: 0, 8: 5}.get(top_k, num_atoms)
    dtype = {4: BF16, 8: F32, 16: F16}.get(top_k, F32)
    case = make_case(
        top_k, (ROWS,), num_atoms - current, current, WIDTH, WIDTH, top_k=top_k,
        temperature=0.1, threshold=0.1, training=top_k == 8, residual=top_k != 16, dtype=dtype,
    )  # fmt: skip
    out, tally = check_resident(case, pair)
    assert tally == (0, 0)
    assert torch.equal(resident(case, pair, save=False)[0], out)


@pytest.mark.parametrize("pair", [p for p in TILES if p[1]] + [(32, 0)], ids=str)
def test_ties_across_tiles_go_to_the_lowest_index(pair):
    num_atoms = sum(pair) - 1
    case = make_case(
        1, (ROWS,), num_atoms - 9, 9, WIDTH, WIDTH, top_k=8, integers=True, dtype=F32, threshold=0
    )
    keys = live(case)[0].clone()
    # Copies of one strong key: all in the first tile, all in the second, or on both sides.
    border = pair[0] if pair[1] else 16
    strong = case.x[0].clone()
    for start in (0, border - 5, border, num_atoms - 9):
        copies = keys.clone()
        copies[start : start + 9] = strong
        check_resident(split(case, copies), pair, exact=True)
    copies = keys.clone()
    copies[::7] = strong
    case = split(case, copies)
    case.x[3:6] = 0
    check_resident(case, pair, exact=True)


def split(case, keys):
    return replace(case, keys=keys[:-9], current_keys=keys[-9:])


@pytest.mark.parametrize("pair", [(16, 0), (64, 32)], ids=str)
def test_bf16x6_is_as_exact_as_float32(pair):
    num_atoms = sum(pair) - 1
    case = make_case(2, (ROWS,), num_atoms, 0, WIDTH, WIDTH, top_k=8, dtype=F32)
    assert check_resident(case, pair, precision="bf16x6")[1] == (0, 0)


@pytest.mark.parametrize("pair", [(32, 0), (64, 32)], ids=str)
def test_rows_that_are_not_finite_stay_alone(pair):
    case = make_case(3, (ROWS,), sum(pair) - 2, 0, WIDTH, WIDTH, top_k=8, dtype=F32)
    clean = resident(case, pair)[0]
    bad = {1: NAN, 4: float("inf"), 17: -float("inf")}
    x = case.x.clone()
    for row, number in bad.items():
        x[row, row] = number
    poisoned = resident(replace(case, x=x), pair)[0]
    others = [row for row in range(ROWS) if row not in bad]
    assert torch.equal(poisoned[others], clean[others]) and clean.isfinite().all()
    assert not poisoned[list(bad)].isfinite().any()
