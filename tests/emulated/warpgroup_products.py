"""wgmma: products of four warps, which read shared memory through the asynchronous proxy.

Sums are there at once. What is watched until the wait is the shared memory that they read.
"""

import numpy as np
from matrices import WIDEN

# Bytes of a row by the swizzling that a descriptor names.
WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}


class WarpgroupProducts:
    def __init__(self, threads, shared):
        self.threads, self.shared = threads, shared
        # (group, units) of products in flight. Groups are counted for all warps: they run in step.
        self.flying, self.group = [], 0

    def multiply(self, mask, columns, kind, old, a, b, keep, majors, mark):
        """a [64, 16] b [columns, 16]^T, added to what was there.

        Args:
            mask: active threads. columns: of the result. kind: "bf16" or "f16".
            old: registers of the sum before, or None. a: four registers, or a descriptor.
            b: a descriptor. keep: whether to add to the old sum. majors: of each operand, whether
            it is transposed. mark: of the instruction.
        """
        threads = self.threads
        threads.whole_warps(mask, mark, 128)
        groups = np.arange(threads.size // 128)
        if mask is not None:
            groups = np.flatnonzero(threads.full(mask)[::128])
        if isinstance(a, tuple):
            left = np.empty((len(groups), 4, 16, 16), np.float32)
            for number, register in enumerate(a):
                halves = np.ascontiguousarray(threads.full(register)).view(np.uint16)
                row, column = number % 2 * 8, number // 2 * 8
                part = WIDEN[kind](halves).reshape(-1, 4, 8, 8)[groups]
                left[:, :, row : row + 8, column : column + 8] = part
            left = left.reshape(-1, 64, 16)
        else:
            left = WIDEN[kind](self._operand(a, 64, majors[0], groups, mark))
        right = WIDEN[kind](self._operand(b, columns, majors[1], groups, mark))
        product = np.matmul(left, right.transpose(0, 2, 1))
        # [groups, 4 warps, 2 halves of rows, 8 rows, columns / 8, 4 threads, 2 columns]
        parts = product.reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        result = []
        for number in range(columns // 2):
            new = np.zeros((threads.size // 128, 4, 8, 4), np.float32)
            new[groups] = parts[:, :, number // 2 % 2, :, number // 4, :, number % 2]
            new = new.reshape(-1)
            if keep is not False:
                total = new + threads.full(old[number]).view(np.float32)
                new = total if keep is True else np.where(keep, total, new)
            result.append(new.view(np.uint32))
        return tuple(result)

    def commit(self):
        self.group += 1

    def wait(self, allowed):
        left = []
        for group, units in self.flying:
            if group < self.group - allowed:
                self.shared.reading[units] -= 1
            else:
                left.append((group, units))
        self.flying = left

    def _operand(self, descriptor, rows, major, groups, mark):
        """Numbers [groups, rows, 16] that descriptors name, after all checks."""
        threads, shared, lane = self.threads, self.shared, int(groups[0]) * 128
        every = threads.full(descriptor).reshape(-1, 128)[groups]
        if (every != every[:, :1]).any():
            raise threads.trap("divergent", "threads disagree on a descriptor", mark, lane)
        at = self._layout(every[:, 0].astype(np.int64), rows, major) - shared.base
        if at.min() < 0 or at.max() + 2 > shared.size:
            message = f"wgmma reads bytes {at.min()} to {at.max()} of {shared.size}"
            raise threads.trap("shared", message, mark, lane)
        at = at + shared.home[groups * 128][:, None, None]
        self._note(np.unique(at // shared.unit), groups, mark, lane)
        return shared.views[2][at >> 1]

    def _layout(self, descriptors, rows, major):
        """Addresses [groups, rows, 16]; see the matrix descriptors of the PTX manual."""
        one = descriptors[:, None, None]
        start, lead, stride = ((one >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        mode = int(descriptors[0] >> 62 & 3)
        width = WIDTHS[mode]
        row, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
        if mode == 0 and major:
            raise NotImplementedError("a transposed operand of wgmma without swizzling")
        if mode == 0:
            at = start + row // 8 * stride + row % 8 * 16 + k // 8 * lead + k % 8 * 2
        elif major == 0:
            at = start + row // 8 * stride + row % 8 * width + k * 2
        else:
            at = start + row * 2 // width * lead + k // 8 * stride
            at = at + k % 8 * width + row * 2 % width
        return at ^ ((at >> 7 & width // 16 - 1) << 4)

    def _note(self, units, groups, mark, lane):
        """Check and remember that the warps of groups read units."""
        threads, shared = self.threads, self.shared
        owner = units * shared.unit // shared.size
        time = threads.time[:: threads.per_cta][owner]
        # Warps of each CTA that read, as bits.
        mine = np.zeros(len(threads.ctas), np.int32)
        first = np.left_shift(15, threads.thread[groups * 128] // 32, dtype=np.int32)
        np.bitwise_or.at(mine, groups * 128 // threads.per_cta, first)
        # Four warps read together: what any single one wrote needs a barrier first.
        checks = (
            ("copy", "what an asynchronous copy has not brought", shared.flying[units]),
            ("unwritten", "what was never written", ~shared.known[units]),
            ("race", "what a warp wrote since the last barrier", shared.wrote[units] == time),
            ("proxy", "what was written without fence.proxy.async", shared.dirty[units]),
        )
        for kind, what, bad in checks:
            if bad.any():
                place = int(units[bad][0]) * shared.unit % shared.size
                message = f"wgmma reads {what}, from byte {place} of shared memory"
                raise threads.trap(kind, message, mark, lane)
        shared.readers[units[shared.read[units] != time]] = 0
        shared.read[units] = time
        shared.readers[units] |= mine[owner]
        shared.reading[units] += 1
        self.flying.append((self.group, units))
