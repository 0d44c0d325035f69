"""Generated networks of min and max that find the top_k-th largest of each row of a score tile.

In the accumulator of a tensor-core product a row lies in a few lanes of one warp (some bits of the
column index are lane bits, the rest are registers). The network sorts runs of top_k registers,
merges the runs, then merges across the lanes. A comparator is one max and one min of registers: no
predicates, and shuffles only for the lane bits. Values alone are sorted; ties are mended after.

Only the speed depends on the layout: with other lane bits the compiler inserts conversions.
Source of the method: Batcher, AFIPS 1968 (odd-even merge sort; bitonic merge).
"""

import functools
import linecache
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

TOP_K = (4, 8, 16)
MAX_TILE = 256


def lane_bits(
    target: int | str, columns: int, fewest: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lane bits, warp bits) of the column index in the accumulator of a tile, per target.

    Those with the fewest layout conversions in the compiled kernel. fewest: columns of the
    narrowest tile of the row; all tiles must have equally many bits.
    """
    if isinstance(target, str) and target.startswith("gfx"):
        lanes, warps = (2,), (5,)
    elif isinstance(target, int) and 100 <= target < 120:
        # In tensor memory two warps share a row, half of the columns each.
        return (), (columns.bit_length() - 2,)
    elif isinstance(target, int) and not 90 <= target < 100:
        lanes, warps = (2, 1), (3,)
    else:
        lanes, warps = (2, 1), ()
    exist = fewest.bit_length() - 1
    return tuple(b for b in lanes if b < exist), tuple(b for b in warps if b < exist)


@functools.cache
def network(tiles: tuple[int, ...], top_k: int, target: int | str) -> KernelInterface[Any]:
    """The Triton function (x, [x2,] BLOCK_M) -> (top_k-th largest, largest) of each row.

    Args:
        tiles: columns of x (and x2), powers of two from 16 to 256 in all.
        top_k: 4, 8 or 16.
        target: as `launcher.target` returns it.
    """
    if top_k not in TOP_K:
        raise ValueError(f"top_k must be one of {TOP_K}, got {top_k}")
    outer = [sum(lane_bits(target, tile, min(tiles))[::-1], ()) for tile in tiles]
    layout = ("_".join(map(str, bits)) for bits in outer)
    name = "network_" + "_".join(map(str, (*tiles, top_k, "bits", *layout)))
    source = _Writer(top_k).function(name, tiles, outer)
    # Triton reads a function's source through `inspect`, which finds it here.
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, filename, "exec"), scope)
    return scope[name]


def sorting_network(size: int) -> list[tuple[int, int]]:
    """Comparators (i, j), larger to i, of Batcher's odd-even merge sort for a power of two."""
    pairs, run = [], 1
    while run < size:
        step = run
        while step:
            for start in range(step % run, size - step, 2 * step):
                for i in range(start, start + step):
                    if i // (2 * run) == (i + step) // (2 * run):
                        pairs.append((i, i + step))
            step //= 2
        run *= 2
    return pairs


class _Writer:
    """Writes one network as the source of a Triton function; None stands for -inf."""

    def __init__(self, top_k: int) -> None:
        self.top_k, self.count = top_k, 0
        self.lines: list[str] = []

    def function(self, name: str, tiles: tuple[int, ...], outer: Sequence[Sequence[int]]) -> str:
        columns = [f"x{i}" for i in range(len(tiles))]
        self.lines = ["@triton.jit", f"def {name}({', '.join(columns)}, BLOCK_M: tl.constexpr):"]
        leaves: list[str | None] = []
        for column, tile, bits in zip(columns, tiles, outer, strict=True):
            leaves += self.registers(column, tile, bits)
        values, parts = self.reduce_runs(leaves), 2 ** len(outer[0])
        while parts > 1:
            values = self.merge_lanes(values, parts)
            parts //= 2
            if parts > 1:
                self.merge_bitonic(values)
        self.say(f"return {_tree('minimum', values)}, {_tree('maximum', values)}")
        return "\n".join(self.lines) + "\n"

    def say(self, line: str) -> None:
        self.lines.append("    " + line)

    def fresh(self, expression: str) -> str:
        self.count += 1
        self.say(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def registers(self, column: str, tile: int, outer: Sequence[int]) -> list[str]:
        """The columns that lie in registers, each [BLOCK_M, warps and lanes of the outer bits]."""
        bits = tile.bit_length() - 1
        inner = [b for b in reversed(range(bits)) if b not in outer]
        parts, each = 2 ** len(outer), 2 ** len(inner)
        lead = f"BLOCK_M, {parts}" if outer else "BLOCK_M"
        if outer:
            # Bit b of the column is dimension bits - b of the split-up shape.
            order = ", ".join(str(bits - b) for b in (*outer, *inner))
            twos = ", ".join("2" for _ in range(bits))
            column = self.fresh(f"tl.reshape({column}, [BLOCK_M, {twos}])")
            column = self.fresh(f"tl.permute({column}, (0, {order}))")
            column = self.fresh(f"tl.reshape({column}, [{lead}, {each}])")
        leaves = [column]
        while each > 1:
            each //= 2
            halves = []
            for leaf in leaves:
                if each > 1:
                    leaf = self.fresh(f"tl.reshape({leaf}, [{lead}, {each}, 2])")
                self.count += 2
                low, high = f"v{self.count - 1}", f"v{self.count}"
                self.say(f"{low}, {high} = tl.split({leaf})")
                halves += [low, high]
            leaves = halves
        return leaves

    def compare(self, values: list[str | None], i: int, j: int) -> None:
        """Order two values, the larger one to i."""
        a, b = values[i], values[j]
        if a is None:
            values[i], values[j] = b, None
        elif b is not None:
            values[i] = self.fresh(f"tl.maximum({a}, {b})")
            values[j] = self.fresh(f"tl.minimum({a}, {b})")

    def merge_bitonic(self, values: list[str | None]) -> None:
        """Sort a bitonic list, largest first."""
        step = self.top_k // 2
        while step:
            for i in range(self.top_k):
                if not i & step:
                    self.compare(values, i, i + step)
            step //= 2

    def reduce_runs(self, leaves: list[str | None]) -> list[str | None]:
        """The top_k largest of a lane's leaves, largest first."""
        pairs = sorting_network(self.top_k)
        runs = []
        for start in range(0, len(leaves), self.top_k):
            run = leaves[start : start + self.top_k]
            run += [None] * (self.top_k - len(run))
            for i, j in pairs:
                self.compare(run, i, j)
            runs.append(run)
        while len(runs) > 1:
            merged = []
            for left, right in zip(runs[::2], runs[1::2], strict=False):
                best = [self.larger(a, b) for a, b in zip(left, reversed(right), strict=True)]
                self.merge_bitonic(best)
                merged.append(best)
            runs = merged + runs[len(merged) * 2 :]
        return runs[0]

    def larger(self, a: str | None, b: str | None) -> str | None:
        if a is None or b is None:
            return b if a is None else a
        return self.fresh(f"tl.maximum({a}, {b})")

    def merge_lanes(self, values: list[str | None], parts: int) -> list[str | None]:
        """The top_k largest, bitonic, of each pair of neighbouring lanes' sorted lists."""
        half = parts // 2
        if None in values:
            nothing = self.fresh(f"tl.full([BLOCK_M, {parts}], float('-inf'), tl.float32)")
            values = [nothing if v is None else v for v in values]
        odd = self.fresh(f"(tl.arange(0, {parts})[None, :] & 1) == 1")
        merged: list[str | None] = []
        for i in range(self.top_k):
            mixed = self.fresh(f"tl.where({odd}, {values[self.top_k - 1 - i]}, {values[i]})")
            if half > 1:
                mixed = self.fresh(f"tl.reshape({mixed}, [BLOCK_M, {half}, 2])")
            merged.append(self.fresh(f"tl.max({mixed}, {2 if half > 1 else 1})"))
        return merged


def _tree(operation: str, values: Sequence[str | None]) -> str:
    values = [v for v in values if v is not None]
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        merged = [f"tl.{operation}({a}, {b})" for a, b in pairs]
        values = merged + values[len(merged) * 2 :]
    return values[0]
