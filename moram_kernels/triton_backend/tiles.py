"""Tiles of every kernel, per target: those that compile to clean machine code there.

What is offered here is compiled by `tests/compile_gate` for every target; of several clean tiles
the cost model takes the fastest. Imports no Triton.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..aliases import Tile
from . import available, cost
from .devices import Device

# Columns of the resident tile or tiles, and the most of them that compile without spills.
TILES = ((16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64))
WIDEST = dict.fromkeys(("sm_80", "sm_89", "sm_120", "gfx942"), 128) | {"sm_90": 192, "sm_100": 96}
# The same before Triton 3.8, for top_k 8 and for others. Of 3.6.0 the gate shows with top_k 8 above
# that 392 bytes of stack on sm_80, 296 on sm_89, 536 on sm_120 and 136 to 216 on sm_90, and none
# with others. For sm_100 it does not compile this kernel: a pass over tensor memory fails.
EARLY = {
    "sm_80": (96, 128),
    "sm_89": (64, 128),
    "sm_90": (128, 192),
    "sm_100": (0, 0),
    "sm_120": (64, 128),
}
# Where two tiles spill: on gfx942 tiles of unequal width have unequal layouts; on sm_89 a thread
# that stores the scores of 96 atoms takes 112 to 192 bytes of stack, on sm_120 at inference 16.
SINGLE = ("sm_89", "sm_120", "gfx942")
# Where float16 takes more registers than bfloat16: 128 atoms at inference on sm_89, the square of
# the keys on sm_120, and on both the sum of values with masks.
TIGHT = ("sm_89", "sm_120")
# Rows, columns and warps of products of 16-bit tensors beside the usual tile, only where registers
# are many and shared memory holds the largest, three times 128 and 256 rows of 64 numbers.
SCORES = ((32, 128, 4), (128, 128, 8), (128, 256, 8))
AGGREGATES = ((128, 128, 8), (128, 256, 8))
LARGE, LARGE_BYTES = ("sm_90", "sm_100"), 3 * (128 + 256) * 64 * 2
# The same where bfloat16 meets float32, whose three parts take registers. Of scores of 128 x 64
# ptxas lets the products not overlap (C7515).
SPLIT_SCORES, SPLIT_AGGREGATES = ((128, 128, 8),), ((128, 64, 8), (128, 128, 8))
# Where its resident tiles are as wide as those of 16-bit products.
SPLIT = ("sm_90",)


def resident_tile(atoms: int, top_k: int, dtype: str, device: Device) -> tuple[int, int] | None:
    """(first, second) tile of the resident kernel that holds that many atoms, or None.

    Args:
        atoms: of the bank. top_k: atoms per token. dtype: of the products.
        device: `Device` that has a target.
    """
    widest = EARLY[device.target][top_k != 8] if available.is_early() else WIDEST[device.target]
    mixed = dtype == "bfloat16+float32" and device.target in SPLIT
    if ("float32" in dtype and not mixed) or (dtype == "float16" and device.target == "sm_89"):
        # What is wider spills: a float32 product takes registers of its own.
        widest = min(64, widest)
    if dtype == "float32" and device.target in ("sm_80", "sm_89") and available.is_early():
        # 24 bytes of stack with bf16x6.
        widest = min(32, widest)
    pairs = (p for p in TILES if not p[1] or device.target not in SINGLE)
    return next((pair for pair in pairs if widest >= sum(pair) >= atoms), None)


def tiles(
    shape: cost.Shape, pair: tuple[int, int] | None, device: Device, dtype: str
) -> dict[str, Any]:
    """Tiles of every kernel a shape can need, by the kernel's name.

    Args:
        shape: `cost.Shape`. pair: the resident tile, or None where that kernel does not fit.
        device: `Device` that has a target. dtype: of the products.
    """
    small, target, units = shape.met == 4, device.target, device.units
    stages = 2 if target == "gfx942" else 3
    common = {"num_warps": 4, "num_stages": stages}
    six = common if target == "gfx942" else {**common, "maxnreg": 255}
    block = 32 if small else 64
    # Products of bfloat16 parts are wide where 64 rows meet, which one of float32 has no room for.
    several = shape.rate in ("three", "six")
    rows = 64 if several and _is_large(device) else block
    tight = dtype == "float16" and (target in TIGHT or (target == "sm_80" and available.is_early()))
    # Masked or unaligned rows are not copied to shared memory but held in registers.
    loose = shape.width % block or shape.out % block
    if several or (not small and (loose or target == "sm_100")):
        # Left to itself, ptxas spills a little here to fit more programs on a unit.
        common = six
    # Scores of 64 x 128, which on sm_120 spill 4 registers before Triton 3.8.
    free = six if target == "sm_120" and available.is_early() else common
    chosen = {
        "scores": _scores(shape, device, rows, loose, free),
        "aggregate": _aggregate(shape, device, rows, loose, tight, common),
        # x (keys^T keys) in float16, of which the square is float32.
        "through": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 32, **six},
        "bank": {"BLOCK_M": block, "BLOCK_A": 16, "BLOCK_B": 64, **common},
        "gram": {"BLOCK_N": 32, "BLOCK_A": 32 if small or tight else 64, "BLOCK_B": 64, **common},
        "bank_splits": max(1, min(64, 2 * units // max(1, (shape.width + shape.out) // 64))),
    }
    scores = chosen["scores"]
    programs = -(-shape.tokens // scores["BLOCK_M"]) * -(-shape.atoms // scores["BLOCK_N"])
    # Splits fill the device twice over and leave each at least 256 features.
    chosen["splits"] = max(1, min(2 * units // programs, shape.width // 256, 16))
    if pair:
        chosen["resident"] = _resident(shape, pair, device, rows, common, dtype)
    return chosen


def _is_large(device: Device) -> bool:
    return device.target in LARGE and device.shared >= LARGE_BYTES


def _is_split(shape: cost.Shape, device: Device) -> bool:
    return shape.rate == "three" and device.target in SPLIT


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _scores(shape: cost.Shape, device: Device, rows: int, loose: int, common: Tile) -> Tile:
    block, columns = 32 if shape.met == 4 else 64, max(16, _power_of_2(shape.atoms))
    if shape.tokens <= 64:
        few = max(16, min(rows, _power_of_2(shape.tokens)))
        return {"BLOCK_M": few, "BLOCK_N": 32, "BLOCK_D": block, **common}
    usual = {"BLOCK_M": rows, "BLOCK_N": min(64 if block == 32 else 128, columns)}
    usual = {**usual, "BLOCK_D": block, **common}
    if loose:
        usual["BLOCK_N"] = min(usual["BLOCK_N"], block)
    split = _is_split(shape, device)
    if loose or (block == 32 and not split) or not _is_large(device):
        return usual
    choices = [
        {**usual, "BLOCK_M": m, "BLOCK_N": min(n, columns), "num_warps": warps}
        for m, n, warps in (SPLIT_SCORES if split else SCORES)
        # Eight warps only where they all have columns; on sm_100 the largest spills.
        if warps == 4 or (columns >= n and (n < 256 or device.target == "sm_90"))
        # Before Triton 3.8 ptxas lets the products of this one not overlap (C7515).
        if not (m == n == 128 and device.target == "sm_90" and available.is_early())
    ]
    return _fastest([usual, *choices], lambda tile: cost.scores(shape, device, tile))


def _aggregate(
    shape: cost.Shape, device: Device, rows: int, loose: int, tight: bool, common: Tile
) -> Tile:
    small, split = shape.met == 4, _is_split(shape, device)
    usual = {"BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_O": 128, **common}
    if small:
        usual["BLOCK_O"] = 32 if loose else 64
    elif loose and tight:
        usual["BLOCK_O"] = 64
    if loose or (small and not split) or not _is_large(device) or shape.tokens <= 64:
        return usual

    def fits(columns: int) -> bool:
        even = not (shape.width % columns or shape.out % columns)
        # On sm_100, and with masks anywhere, the largest spills; with masks, so do all split ones.
        return even if split else columns < 256 or (device.target == "sm_90" and even)

    choices = [
        {**usual, "BLOCK_M": m, "BLOCK_O": o, "num_warps": warps}
        for m, o, warps in (SPLIT_AGGREGATES if split else AGGREGATES)
        if fits(o)
    ]
    return _fastest([usual, *choices], lambda tile: cost.aggregate(shape, device, tile))


def _fastest(choices: Sequence[Tile], seconds: Callable[[Tile], float]) -> Tile:
    """The choice of the least modelled time, the first of them if several are equal."""
    return min(choices, key=seconds)


def _resident(
    shape: cost.Shape, pair: tuple[int, int], device: Device, rows: int, common: Tile, dtype: str
) -> dict[str, int]:
    first, second = pair
    columns, small = first + second, shape.met == 4
    tall = columns > 64 and (not small or _is_split(shape, device))
    # Eight warps on 64 rows halve a thread's scores, at the price of layout conversions.
    narrow = columns > 128
    if columns == 160 and dtype == "bfloat16" and not shape.training:
        # Just fits without them, in steps of 64; before Triton 3.8 it takes 40 bytes of stack.
        narrow = bool(shape.width % 64 or shape.out % 64) or available.is_early()
    config = {
        "BLOCK_M": (64 if narrow else 128) if tall else rows,
        "BLOCK_N": first,
        "BLOCK_N2": second,
        "BLOCK_D": 64 if shape.width % 64 == 0 and not small else 32,
        "BLOCK_O": 64 if shape.out % 64 == 0 and not small else 32,
        **common,
        "num_warps": 8 if tall else 4,
    }
    if tall and device.target != "sm_100":
        config.pop("maxnreg", None)
    return config
