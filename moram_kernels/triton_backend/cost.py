"""The cost model: how long each path should take on a device. Modelled, not measured.

Counted is what `forward.py` and `backward.py` launch, kernel by kernel and tile by tile; how long
one copy or product takes is `rates.py`. Rankings within 1.2 mean nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..aliases import Tile, Tiles
from .devices import DEVICES, H100, Device, device_model
from .rates import (
    CACHE_SHARE,
    ISSUE_SHARE,
    KERNEL_SHARE,
    LAUNCH,
    MEMORY_SHARE,
    SHARED_UNIT,
    SHORTEST,
    STEP,
    TILES,
    flops,
    product,
    stream,
)

__all__ = [
    "DEVICES",
    "H100",
    "LAUNCH",
    "Device",
    "Shape",
    "backward_times",
    "device_model",
    "flops",
    "forward_times",
    "gather",
    "groups",
    "product",
    "stream",
]

# A program's prologue and selection, and one round of arg-max with its row of values (decode).
PROLOGUE, ROUND = 2.5e-6, 0.5e-6
# Layout conversions through shared memory where the columns of a row lie in two groups of warps:
# about 150 barriers of some 35 cycles.
CONVERSIONS = 3e-6
# Instructions a score in a kernel that holds whole rows: selecting, without selection, backward.
# Executed for sm_90 (tests/emulated/counts.csv): 64 to 103 for the first, 35 to 43 for the last,
# 73 of few atoms. The second is guessed.
SELECT, KEEP_ALL, ROWS_BACKWARD = 85, 30, 40
# Instructions a score for the largest one of every group and the sum of its squares: executed.
MAXIMA = 8.5
# Rows of up to this many numbers are selected from in registers; larger banks in groups.
ROW_ATOMS, GROUP = 8192, 32
# Float32 scores of at most this many bytes exist at a time; tokens are taken in chunks.
SCORE_BYTES = 256 * 2**20
# Rows, columns and inner size of a kernel's tile, by the letters of its config.
LETTERS = {"scores": "MND", "aggregate": "MON", "gram": "ABN"}


@dataclass(frozen=True)
class Shape:
    """What is to be computed: M tokens, D -> O, N atoms of which C current, top_k.

    itemsize: bytes of a number that goes in or out.
    rate: FLOP/s share of products: "half", "single" (ieee float32), "six" (bf16x6) or "three", as
    where bfloat16 meets float32.
    joined: whether keys and values are one segment each, as the vendor's library needs.
    residual: whether there is one of many rows, to which the library does not add.
    copied: whether the library's products copy the segments into one first.
    """

    tokens: int
    width: int
    out: int
    atoms: int
    current: int
    top_k: int
    itemsize: int
    rate: str
    joined: bool
    training: bool
    residual: bool = True
    copied: bool = False

    @property
    def met(self) -> int:
        """Bytes of a number of the bank, and of factors that meet it."""
        return 2 if self.rate == "half" else 4


def forward_times(
    device: Device, shape: Shape, tile: int | None, tiles: Tiles | None = None
) -> dict[str, float]:
    """Seconds of each forward path that covers the shape: {path: seconds}.

    Args:
        tile: columns of the resident tile, or None where the bank does not fit.
        tiles: of the kernels, as in `Plan.tiles`; the usual ones if None.
    """
    times, tiles = {}, tiles or {}
    if tile and shape.tokens > 64:
        times["resident"] = _resident(device, shape, tile, tiles.get("resident"))
    if shape.tokens <= 64 and not shape.training and shape.atoms <= ROW_ATOMS:
        times["decode"] = _decode(device, shape, tiles)
    scores = _scores(device, shape, shape.width, tiles)
    if shape.atoms <= ROW_ATOMS:
        dense = _select(device, shape, False) + _aggregate_values(device, shape, tiles)
        times["split-dense"] = scores + dense + 3 * _chunks(shape, True) * LAUNCH
    read = gather(device, shape, shape.out, _residual_bytes(shape))
    lists = min(_lists(device, shape, tiles).values())
    times["split-gather"] = lists + read + 3 * _chunks(shape, False) * LAUNCH
    return times


def groups(device: Device, shape: Shape, tiles: Tiles) -> str | None:
    """How lists are made fastest: "fused", "apart" or None, as in `Plan.groups`."""
    times = _lists(device, shape, tiles)
    return min(times, key=times.__getitem__)


def _lists(device: Device, shape: Shape, tiles: Tiles) -> dict[str | None, float]:
    """Seconds of scores and lists, by how the lists are made."""
    scores, times = _scores(device, shape, shape.width, tiles), {}
    if shape.atoms <= ROW_ATOMS:
        times[None] = scores + _select(device, shape, True)
    if shape.atoms >= 2 * GROUP * shape.top_k:
        own = _scores(device, replace(shape, joined=False), shape.width, tiles)
        every = shape.tokens * shape.atoms
        maxima = every * MAXIMA / 32 / (device.issue * ISSUE_SHARE)
        chosen = _select_groups(device, shape)
        times["fused"] = own + maxima + chosen
        times["apart"] = scores + max(maxima, stream(device, 4 * every)) + chosen
    return times


def _select_groups(device: Device, shape: Shape) -> float:
    """Searching the maxima of all groups, then the scores of the top_k groups."""
    found, count = math.ceil(shape.atoms / GROUP), GROUP * shape.top_k
    moved = 8 * found + 4 * count + 12 * shape.top_k + 8 * shape.current * shape.training
    padded = sum(1 << (size - 1).bit_length() for size in (found, count))
    issued = shape.tokens * padded * SELECT / 32 / (device.issue * ISSUE_SHARE)
    return max(stream(device, shape.tokens * moved, True), issued, 3e-6)


def backward_times(device: Device, shape: Shape, tiles: Tiles | None = None) -> dict[str, float]:
    """Seconds of the backward from saved scores ("dense") and from saved lists ("lists")."""
    tiles, size, met, times = tiles or {}, shape.itemsize, shape.met, {}
    if shape.atoms <= ROW_ATOMS:
        pull = _scores(device, shape, shape.out, tiles)
        moved = shape.atoms * (8 + met) + shape.current * met + 16
        rows = _rows(device, shape, moved, ROWS_BACKWARD)
        dx = _aggregate(device, shape, shape.width, tiles)
        bank = _bank_gradient(device, shape, tiles.get("bank_splits"))
        times["dense"] = pull + rows + dx + bank + 3 * LAUNCH
    kept = 8 * shape.top_k + shape.current * (4 + 2 * met)
    pulls = gather(device, shape, shape.out, shape.out * size + kept)
    square = _product(
        device, shape, shape.width, shape.width, shape.atoms, met, tile=_tile(tiles, "gram", met)
    )
    # keys^T keys is one piece of memory whatever the bank is.
    through = product(
        device, shape.tokens, shape.width, shape.width, size, shape.rate, out=4,
        library=met == 2, tile=_tile(tiles, "scores", met),
    )  # fmt: skip
    dx = gather(device, shape, shape.width, shape.width * (4 + size))
    times["lists"] = pulls + square + through + dx + _bank_gradient(device, shape, 1) + 4 * LAUNCH
    return times


def gather(device: Device, shape: Shape, width: int, passes: float) -> float:
    """Seconds to read the rows of top_k atoms for each token.

    Args:
        device: `Device`. shape: `Shape`. width: numbers in a row.
        passes: bytes a token that only stream.
    """
    moved = shape.tokens * min(shape.top_k, shape.atoms) * width * shape.met
    near = shape.atoms * width * shape.met < device.cache_bytes
    rate = device.cache * CACHE_SHARE if near else 1.6 * device.memory * MEMORY_SHARE
    return max(3e-6, moved / rate + shape.tokens * passes / (device.memory * MEMORY_SHARE))


def scores(shape: Shape, device: Device, tile: Tile) -> float:
    """Seconds of a shape's scores with a tile {"BLOCK_M", "BLOCK_N", "BLOCK_D"}, by our kernel."""
    shape = replace(shape, joined=False)
    return _scores(device, shape, shape.width, {"scores": tile})


def aggregate(shape: Shape, device: Device, tile: Tile) -> float:
    """Seconds of a shape's sum of values with a tile {"BLOCK_M", "BLOCK_O", "BLOCK_N"}."""
    return _aggregate_values(device, replace(shape, joined=False), {"aggregate": tile})


def _product(
    device: Device, shape: Shape, rows: int, columns: int, inner: int, itemsize: int, **how: Any
) -> float:
    """A product with the bank, which has as many numbers as columns times inner."""
    library = shape.joined and shape.met == 2
    time = product(device, rows, columns, inner, itemsize, shape.rate, library=library, **how)
    if library and shape.copied:
        time += stream(device, 2 * columns * inner * itemsize, True) + LAUNCH
    return time


def _tile(tiles: Tiles, name: str, met: int) -> Sequence[int]:
    """(rows, columns, inner) of a kernel's tile."""
    if name not in tiles:
        return TILES[met][name]
    return tuple(tiles[name][f"BLOCK_{letter}"] for letter in LETTERS[name])


def _chunks(shape: Shape, dense: bool) -> int:
    """How often the launches of a split path repeat; scores kept for a backward stay whole."""
    if dense and shape.training:
        return 1
    return math.ceil(shape.tokens / (max(64, SCORE_BYTES // (4 * shape.atoms)) // 64 * 64))


def _scores(device: Device, shape: Shape, inner: int, tiles: Tiles) -> float:
    """All atoms' scores, or their pull, in float32."""
    tile, sizes = _tile(tiles, "scores", shape.met), (shape.tokens, shape.atoms, inner)
    return _product(device, shape, *sizes, shape.itemsize, out=4, tile=tile)


def _aggregate(device: Device, shape: Shape, columns: int, tiles: Tiles, extra: float = 0) -> float:
    tile = _tile(tiles, "aggregate", shape.met)
    sizes = (shape.tokens, columns, shape.atoms, shape.met)
    return _product(device, shape, *sizes, out=shape.itemsize, extra=extra, tile=tile)


def _aggregate_values(device: Device, shape: Shape, tiles: Tiles) -> float:
    extra = shape.tokens * shape.out * shape.itemsize * shape.residual
    shape = replace(shape, joined=shape.joined and not shape.residual)
    return _aggregate(device, shape, shape.out, tiles, extra)


def _residual_bytes(shape: Shape) -> int:
    """Residual read and output written, bytes a token."""
    return (1 + shape.residual) * shape.out * shape.itemsize


def _rows(device: Device, shape: Shape, moved: float, instructions: float) -> float:
    """A kernel that holds whole rows of scores; moved: bytes a token."""
    padded = max(16, 1 << (shape.atoms - 1).bit_length())
    issued = shape.tokens * padded * instructions / 32
    time = issued / (device.issue * ISSUE_SHARE)
    return max(stream(device, shape.tokens * moved, True), time, 3e-6)


def _select(device: Device, shape: Shape, lists: bool) -> float:
    count = min(shape.top_k, shape.atoms)
    moved = shape.atoms * 4 + (count * 12 if lists else shape.atoms * shape.met)
    if shape.training:
        moved += 16 + (4 * shape.current if lists else 0)
    instructions = KEEP_ALL if shape.top_k >= shape.atoms else SELECT
    return _rows(device, shape, moved, instructions)


def _bank_gradient(device: Device, shape: Shape, splits: int | None) -> float:
    """dkeys and dvalues in one launch: tiles of 16 atoms by 64 features, splits of the tokens."""
    if not shape.current:
        return 0.0
    width, size = shape.width + shape.out, shape.itemsize
    columns = math.ceil(shape.width / 64) + math.ceil(shape.out / 64)
    if splits is None:
        splits = max(1, min(64, 2 * device.units // max(1, width // 64)))
    rows, groups = 32 if shape.met == 4 else 64, math.ceil(shape.current / 16)
    splits = max(1, min(splits, math.ceil(shape.tokens / rows)))
    programs = columns * groups * splits
    moved = shape.tokens * (width * size + 2 * shape.current * shape.met)
    cached = shape.tokens * groups * (width * size + 16 * columns * shape.met)
    busy = min(1.0, programs / (0.75 * device.units))
    work = 2 * shape.tokens * 16 * groups * width
    rate = flops(device, shape.rate) * KERNEL_SHARE * min(1.0, programs / device.units)
    steps = math.ceil(shape.tokens / splits / rows)
    time = max(
        moved / (device.memory * MEMORY_SHARE * busy),
        cached / (device.cache * CACHE_SHARE * busy),
        work / rate,
        (steps * STEP + SHORTEST) * math.ceil(programs / (SHARED_UNIT * device.units)),
    )
    if splits > 1:
        time += LAUNCH + stream(device, (4 * splits + shape.met) * shape.current * width, True)
    return time + LAUNCH


def _resident(device: Device, shape: Shape, tile: int, config: Tile | None) -> float:
    size, wide = shape.itemsize, shape.met == 4
    rows = 32 if wide else 128 if tile > 64 else 64
    step_d, step_o = (32, 32) if wide else (64, 64)
    warps = rows // 16
    if config is not None:
        rows, step_d, step_o = config["BLOCK_M"], config["BLOCK_D"], config["BLOCK_O"]
        warps = config["num_warps"]
    programs = math.ceil(shape.tokens / rows)
    busy = min(1.0, programs / (0.75 * device.units))
    saved = shape.tokens * (shape.atoms * 4 + 16) if shape.training else 0
    moved = shape.tokens * (shape.width * size + _residual_bytes(shape)) + saved
    bank = tile * (shape.width + shape.out) * shape.met
    work = 2 * programs * rows * tile * (shape.width + shape.out)
    columns, features = shape.width / 64, shape.out / 64
    # Of a warp, for its rows; within a sixth of what is executed for 16 and 160 atoms on sm_90.
    instructions = (87 + 0.22 * tile) * columns + (150 + 0.6 * tile) * features + 16 * tile
    shared = 3 if tile <= 64 and rows <= 64 else 2 if rows <= 64 or tile <= 64 else 1
    prologue = PROLOGUE
    if config is not None and rows == 64 and config["num_warps"] == 8:
        # A row's columns lie in two groups of warps: more registers each, and conversions.
        shared, prologue = 1, PROLOGUE + CONVERSIONS
    waves = math.ceil(programs / (device.units * shared))
    busy_units = min(1.0, programs / device.units)
    # The residual's tile is loaded where it is needed, not ahead.
    steps = shape.width / step_d + shape.out / step_o * (2 if shape.residual else 1)
    times = (
        (moved + bank) / (device.memory * MEMORY_SHARE * busy),
        (moved + programs * bank) / (device.cache * CACHE_SHARE * busy),
        work / (flops(device, shape.rate) * KERNEL_SHARE * busy_units),
        shape.tokens * instructions * warps / rows / (device.issue * ISSUE_SHARE * busy_units),
        (steps * STEP + prologue) * waves,
    )
    return max(times) + LAUNCH


def _decode(device: Device, shape: Shape, tiles: Tiles) -> float:
    """Partial scores, then a program per token and 256 features that reads all of a row's."""
    size, count = shape.itemsize, min(shape.top_k, shape.atoms)
    splits = tiles.get("splits") or max(1, min(shape.width // 256, 16))
    tile = _tile(tiles, "scores", shape.met) if "scores" in tiles else (16, 32, 128 // shape.met)
    args = (shape.tokens, shape.atoms, shape.width, size, shape.rate)
    scores = product(device, *args, out=4, tile=tile, splits=splits)
    features = math.ceil(shape.out / 256)
    programs = shape.tokens * features
    padded = max(16, 1 << (shape.atoms - 1).bit_length())
    read = min(shape.tokens * count, shape.atoms) * shape.out * shape.met
    again = shape.tokens * count * shape.out * shape.met
    partial = programs * splits * shape.atoms * 4
    warps = max(1, min(8, padded // 512))
    # A score a lane and round: marked, compared and reduced.
    issued = programs * padded * (12 * count + splits) / 32
    units = min(1.0, programs * warps / (4 * device.units))
    times = (
        (read + shape.tokens * _residual_bytes(shape)) / (device.memory * MEMORY_SHARE),
        (again + partial) / (device.cache * CACHE_SHARE * min(1.0, programs / device.units)),
        issued / (device.issue * ISSUE_SHARE * units),
        SHORTEST + count * ROUND,
    )
    return scores + max(times) + LAUNCH
