"""How long a copy or a product should take at a GPU's rates. Modelled, not measured.

A kernel takes the longest of: its bytes through device memory, its bytes through L2, its products,
and the latency of one program. Operands that several programs read count once for memory and every
time for L2. Of the peak rates in `devices.py` it gets the fraction that streaming kernels and
skinny products reach in published measurements.
"""

import math
from collections.abc import Sequence

from .devices import Device

# Fractions of the peak rates that kernels reach.
MEMORY_SHARE, CACHE_SHARE = 0.88, 0.90
LIBRARY_SHARE, KERNEL_SHARE, ISSUE_SHARE = 0.68, 0.60, 0.6
# Seconds of a dependent launch beyond its work, and the shortest kernel.
LAUNCH, SHORTEST = 1.0e-6, 2.0e-6
# One step of a loop over D or O in a program: memory latency, 0.7 us, over two loads in flight. A
# load that the compiler does not issue ahead, such as the residual's, costs two. From L2: half one.
STEP = 0.35e-6
# Programs of our products that share a unit.
SHARED_UNIT = 3
# Tiles (rows, columns, inner) of our products by bytes a number, where no plan is given.
TILES = {
    2: {"scores": (64, 128, 64), "aggregate": (64, 128, 32), "gram": (64, 64, 32)},
    4: {"scores": (32, 64, 32), "aggregate": (32, 64, 32), "gram": (64, 64, 32)},
}


def flops(device: Device, rate: str) -> float:
    """Peak FLOP/s of products at a rate."""
    half = device.half
    return {"half": half, "single": device.single, "three": half / 3, "six": half / 6}[rate]


def stream(device: Device, size: float, cached: bool = False) -> float:
    """A kernel that only moves bytes."""
    inside = cached and size < device.cache_bytes
    rate = device.cache * CACHE_SHARE if inside else device.memory * MEMORY_SHARE
    return max(SHORTEST, size / rate)


def product(
    device: Device,
    rows: int,
    columns: int,
    inner: int,
    itemsize: int,
    rate: str,
    *,
    out: int | None = None,
    extra: float = 0,
    library: bool = False,
    tile: Sequence[int] | None = None,
    splits: int = 1,
) -> float:
    """A matrix product.

    Args:
        out: bytes of a result. extra: bytes read and written besides operands and result.
        library: whether the vendor's library does it, whose tiles are its own.
        tile: (rows, columns, inner) of our kernel, or None for that of large scores.
        splits: programs that share one tile's inner sum and each write a part of it.
    """
    out = itemsize if out is None else out
    if not library:
        tile = tile or TILES[2 if rate == "half" else 4]["scores"]
        return _our_product(device, rows, columns, inner, itemsize, rate, out, extra, tile, splits)
    best = math.inf
    for tile_m, tile_n in ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64)):
        tiles = math.ceil(rows / tile_m) * math.ceil(columns / tile_n)
        splits = max(1, min(device.units // tiles, inner // 256))
        written = rows * columns * out + extra
        if splits > 1:
            written += 2 * splits * rows * columns * 4
        programs = tiles * splits
        memory = (rows + columns) * inner * itemsize + written
        # The library shares tiles between neighbouring programs, which halves its L2 traffic.
        cache = tiles * (min(tile_m, rows) + min(tile_n, columns)) * inner * itemsize / 2 + written
        busy = min(1.0, programs / (0.75 * device.units))
        waves = max(1.0, math.ceil(programs / device.units) * device.units / programs)
        work = 2 * rows * columns * inner * waves
        best = min(
            best,
            # Split sums are added up by a second kernel.
            (LAUNCH if splits > 1 else 0.0)
            + max(
                memory / (device.memory * MEMORY_SHARE * busy),
                cache / (device.cache * CACHE_SHARE * busy),
                work / (flops(device, rate) * LIBRARY_SHARE * min(1.0, programs / device.units)),
                inner / splits / 64 * STEP / 4,
                SHORTEST,
            ),
        )
    return best


def _our_product(
    device: Device,
    rows: int,
    columns: int,
    inner: int,
    itemsize: int,
    rate: str,
    out: int,
    extra: float,
    tile: Sequence[int],
    splits: int,
) -> float:
    tile_m, tile_n, tile_k = tile
    tile_n = min(tile_n, max(16, 1 << (columns - 1).bit_length()))
    tiles = math.ceil(rows / tile_m) * math.ceil(columns / tile_n)
    programs = tiles * splits
    written = rows * columns * out * splits + extra
    memory = (rows + columns) * inner * itemsize + written
    # Rows and columns past the end repeat the last one, which is read again from L1.
    cache = tiles * (min(tile_m, rows) + min(tile_n, columns)) * inner * itemsize + written
    busy = min(1.0, programs / (0.75 * device.units))
    waves = max(1.0, math.ceil(programs / device.units) * device.units / programs)
    work = 2 * tiles * tile_m * tile_n * inner * waves
    steps = math.ceil(inner / splits / tile_k)
    near = (rows + columns) * inner * itemsize < device.cache_bytes
    latency = steps * STEP * (0.5 if near else 1.0) + SHORTEST
    return max(
        memory / (device.memory * MEMORY_SHARE * busy),
        cache / (device.cache * CACHE_SHARE * busy),
        work / (flops(device, rate) * KERNEL_SHARE * min(1.0, programs / device.units)),
        latency * math.ceil(programs / (SHARED_UNIT * device.units)),
    )
