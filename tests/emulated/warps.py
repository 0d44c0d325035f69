"""What threads of a warp tell each other through registers: shuffles, votes, reductions."""

import numpy as np

REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Warps:
    def __init__(self, threads):
        self.threads = threads
        self._sources = {}

    def shuffle(self, mask, value, mode, by, clamp, mark):
        """shfl.sync: each thread's value of another one. by: a number, or one of each thread."""
        self.threads.whole_warps(mask, mark)
        if np.ndim(value) == 0:
            return value
        if np.ndim(by):
            return value[self._source(mode, by.reshape(-1, 32).astype(np.int64), clamp)]
        key = (mode, int(by), clamp)
        if key not in self._sources:
            self._sources[key] = self._source(*key)
        return value[self._sources[key]]

    def _source(self, mode, by, clamp):
        lane = np.arange(32)
        segment, clamp = clamp >> 8 & 31, clamp & 31
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": low | (by & 31 & ~segment),
        }[mode]
        inside = source >= high if mode == "up" else source <= high
        first = np.arange(self.threads.warps)[:, None] * 32
        return (first + np.where(inside, source, lane)).ravel()

    def reduce(self, mask, value, mode, mark):
        """redux.sync."""
        self.threads.whole_warps(mask, mark)
        rows = self.threads.full(value).reshape(-1, 32)
        return np.repeat(REDUCTIONS[mode].reduce(rows, axis=1, dtype=rows.dtype), 32)

    def vote(self, mask, value, mode, mark):
        """vote.sync."""
        self.threads.whole_warps(mask, mark)
        rows = self.threads.full(value).reshape(-1, 32)
        if mode == "ballot":
            bits = rows.astype(np.uint32) << np.arange(32, dtype=np.uint32)
            return np.repeat(bits.sum(1, dtype=np.uint32), 32)
        return np.repeat({"any": rows.any, "all": rows.all}[mode](1), 32)
