"""The cost model: how long each path should take on a device. Modelled, not measured.

A kernel takes the longest of: its bytes through device memory, its bytes through L2, its products,
and the latency of one program. Rates are the makers' peak figures times a fraction that streaming
kernels and skinny products reach in published measurements. Rankings within 1.2 mean nothing.
"""

import math
from dataclasses import dataclass

# Fractions of the peak rates that kernels reach.
MEMORY_SHARE, CACHE_SHARE = 0.88, 0.90
LIBRARY_SHARE, KERNEL_SHARE = 0.68, 0.60
# Seconds of a dependent launch beyond its work, and the shortest kernel.
LAUNCH, SHORTEST = 1.0e-6, 2.0e-6
# One step of a loop over D or O in a program, and a program's prologue and selection.
STEP, PROLOGUE = 0.35e-6, 2.5e-6


@dataclass(frozen=True)
class Device:
    """Peak rates of a GPU: bytes/s of memory and L2, FLOP/s in 16 bit and float32, issue slots."""

    name: str
    units: int
    memory: float
    cache: float
    half: float
    single: float
    clock: float = 1.7e9
    cache_bytes: float = 40e6

    @property
    def issue(self):
        """Warp instructions a second."""
        return 4 * self.units * self.clock


H100 = Device("H100", 132, 3.35e12, 5.5e12, 989e12, 67e12)
DEVICES = (
    Device("B200", 148, 8.0e12, 10e12, 2250e12, 80e12, 1.8e9, 100e6),
    Device("H200", 132, 4.8e12, 5.5e12, 989e12, 67e12),
    H100,
    Device("A100", 108, 2.0e12, 4.0e12, 312e12, 19.5e12, 1.4e9, 30e6),
    Device("MI300", 304, 5.3e12, 8.0e12, 1307e12, 163e12, 2.1e9, 200e6),
)


def device_model(name):
    """The rates for a device's full name; an H100's where it is not listed."""
    return next((device for device in DEVICES if device.name in name), H100)


@dataclass(frozen=True)
class Shape:
    """What is to be computed: M tokens, D -> O, N atoms of which C current, top_k, bytes a number.

    rate: FLOP/s share of products: "half", "single" (ieee float32) or "six" (bf16x6).
    joined: whether keys and values are one segment each, as the vendor's library needs.
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


def flops(device, rate):
    """Peak FLOP/s of products at a rate."""
    return {"half": device.half, "single": device.single, "six": device.half / 6}[rate]


def stream(device, size, cached=False):
    """A kernel that only moves bytes."""
    inside = cached and size < device.cache_bytes
    rate = device.cache * CACHE_SHARE if inside else device.memory * MEMORY_SHARE
    return max(SHORTEST, size / rate)


def product(device, rows, columns, inner, itemsize, rate, *, out=None, extra=0, library=False):
    """A matrix product; out: bytes of a result, extra: bytes read besides the operands."""
    out = itemsize if out is None else out
    best = math.inf
    for tile_m, tile_n in ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64)):
        tiles = math.ceil(rows / tile_m) * math.ceil(columns / tile_n)
        splits = 1
        if library:
            splits = max(1, min(device.units // tiles, inner // 256)) if tiles else 1
        written = rows * columns * out + extra
        if splits > 1:
            written += 2 * splits * rows * columns * 4
        programs = tiles * splits
        memory = (rows + columns) * inner * itemsize + written
        # The library shares tiles between neighbouring programs, which halves its L2 traffic.
        tile_bytes = (min(tile_m, rows) + min(tile_n, columns)) * inner * itemsize
        cache = tiles * tile_bytes / (2 if library else 1) + written
        busy = min(1.0, programs / (0.75 * device.units))
        waves = max(1.0, math.ceil(programs / device.units) * device.units / programs)
        share = LIBRARY_SHARE if library else KERNEL_SHARE
        work = 2 * rows * columns * inner * waves
        best = min(
            best,
            max(
                memory / (device.memory * MEMORY_SHARE * busy),
                cache / (device.cache * CACHE_SHARE * busy),
                work / (flops(device, rate) * share * min(1.0, programs / device.units)),
                inner / splits / 64 * STEP / 4,
                SHORTEST,
            ),
        )
    return best


def forward_times(device, shape, tile):
    """Seconds of each forward path that covers the shape: {path: seconds}.

    tile: columns of the resident tile, or None where the bank does not fit.
    """
    times = {}
    if tile and shape.tokens > 64:
        times["resident"] = _resident(device, shape, tile)
    if shape.tokens <= 64 and not shape.training and shape.atoms <= 8192:
        times["decode"] = _decode(device, shape)
    scores = _product(device, shape, shape.tokens, shape.atoms, shape.width, out=4)
    dense = _select(device, shape, False) + _dense_values(device, shape)
    lists = _select(device, shape, True) + gather(device, shape, shape.out)
    if shape.atoms <= 8192:
        times["split-dense"] = scores + dense + 3 * LAUNCH
    times["split-gather"] = scores + lists + 3 * LAUNCH
    return times


def backward_times(device, shape):
    """Seconds of the backward from saved scores ("dense") and from saved lists ("lists")."""
    bank = _bank_gradient(device, shape)
    pull = _product(device, shape, shape.tokens, shape.atoms, shape.out, out=4)
    rows = _rows(device, shape.tokens * shape.atoms * (8 + shape.itemsize), shape)
    dx = _product(device, shape, shape.tokens, shape.width, shape.atoms)
    times = {"dense": pull + rows + dx + bank + 4 * LAUNCH}
    square = _product(device, shape, shape.width, shape.width, shape.atoms)
    through = _product(device, shape, shape.tokens, shape.width, shape.width, out=4)
    gathers = gather(device, shape, shape.out) + gather(device, shape, shape.width)
    # One pass over the tokens without splits: as long as a program's loop over them.
    single = max(bank, shape.tokens / 64 * STEP)
    times["lists"] = square + through + gathers + single + 5 * LAUNCH
    return times if shape.atoms <= 8192 else {"lists": times["lists"]}


def gather(device, shape, width):
    """Reading top_k rows a token, and the residual's two passes."""
    moved = shape.tokens * min(shape.top_k, shape.atoms) * width * shape.itemsize
    near = shape.atoms * width * shape.itemsize < device.cache_bytes
    rate = device.cache * CACHE_SHARE if near else 1.6 * device.memory * MEMORY_SHARE
    passes = 2 * shape.tokens * width * shape.itemsize / (device.memory * MEMORY_SHARE)
    return max(3e-6, moved / rate + passes)


def _product(device, shape, rows, columns, inner, **sizes):
    library = shape.joined and shape.itemsize == 2
    return product(
        device, rows, columns, inner, shape.itemsize, shape.rate, library=library, **sizes
    )


def _dense_values(device, shape):
    passes = shape.tokens * shape.out * shape.itemsize * shape.residual
    return _product(device, shape, shape.tokens, shape.out, shape.atoms, extra=passes)


def _rows(device, size, shape):
    instructions = shape.tokens * shape.atoms * 60 / 32
    return max(stream(device, size, True), instructions / (device.issue * 0.6), 3e-6)


def _select(device, shape, lists):
    written = min(shape.top_k, shape.atoms) * 12 if lists else shape.atoms * shape.itemsize
    time = _rows(device, shape.tokens * (shape.atoms * 4 + written), shape)
    return time if shape.atoms <= 8192 else time + LAUNCH + SHORTEST


def _bank_gradient(device, shape):
    if not shape.current:
        return 0.0
    moved = shape.tokens * (shape.width + shape.out) * shape.itemsize
    work = 2 * shape.tokens * max(16, shape.current) * (shape.width + shape.out)
    rate = flops(device, shape.rate) * KERNEL_SHARE
    return max(stream(device, moved), work / rate) + LAUNCH + SHORTEST


def _resident(device, shape, tile):
    best, size = math.inf, shape.itemsize
    for rows in (64, 128):
        programs = math.ceil(shape.tokens / rows)
        busy = min(1.0, programs / (0.75 * device.units))
        saved = shape.tokens * (shape.atoms * 4 + 16) if shape.training else 0
        moved = shape.tokens * (shape.width + (1 + shape.residual) * shape.out) * size + saved
        bank = tile * (shape.width + shape.out) * size
        work = 2 * shape.tokens * tile * (shape.width + shape.out)
        columns, features = shape.width / 64, shape.out / 64
        instructions = (87 + 0.22 * tile) * columns + (150 + 0.6 * tile) * features + 16 * tile
        resident = 3 if tile <= 64 and rows == 64 else 2 if rows == 64 or tile <= 64 else 1
        waves = math.ceil(programs / (device.units * resident))
        busy_units = min(1.0, programs / device.units)
        best = min(
            best,
            max(
                (moved + bank) / (device.memory * MEMORY_SHARE * busy),
                (moved + programs * bank) / (device.cache * CACHE_SHARE * busy),
                work / (flops(device, shape.rate) * KERNEL_SHARE * busy_units),
                shape.tokens * instructions / 16 / (device.issue * 0.6 * busy_units),
                ((columns + features) * STEP + PROLOGUE) * waves,
            ),
        )
    return best + LAUNCH


def _decode(device, shape):
    size, memory = shape.itemsize, device.memory * MEMORY_SHARE
    scores = (shape.atoms + shape.tokens) * shape.width * size
    rows = min(shape.tokens * shape.top_k, shape.atoms)
    values = (rows + (1 + shape.residual) * shape.tokens) * shape.out * size
    return max(2.5e-6, scores / memory) + max(4e-6, values / memory)
