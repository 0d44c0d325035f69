"""Matrices that the threads of a warp hold together: ldmatrix, stmatrix, mma."""

import numpy as np
from ptx_numbers import from_bf16, from_f16

WIDEN = {"bf16": from_bf16, "f16": from_f16}


class Matrices:
    def __init__(self, threads, shared):
        self.threads, self.shared = threads, shared

    def load(self, mask, base, offset, count, transposed, mark):
        """ldmatrix: `count` matrices of 8 x 8 16-bit numbers from shared memory."""
        at, warps = self._rows(mask, base, offset, count, mark, self.shared.note_read)
        cells = self.shared.views[2][(at >> 1)[..., None] + np.arange(8)]
        if transposed:
            cells = cells.swapaxes(2, 3)
        cells = np.ascontiguousarray(cells).view(np.uint32)  # [warps, count, 8, 4]
        result = []
        for number in range(count):
            new = np.zeros((self.threads.warps, 32), np.uint32)
            new[warps] = cells[:, number].reshape(-1, 32)
            result.append(new.reshape(-1))
        return tuple(result)

    def store(self, mask, base, offset, values, transposed, mark):
        """stmatrix: the same the other way."""
        at, warps = self._rows(mask, base, offset, len(values), mark, self.shared.note_write)
        for number, value in enumerate(values):
            cells = self._halves(value).reshape(-1, 8, 8)[warps]
            if transposed:
                cells = cells.swapaxes(1, 2)
            self.shared.views[2][(at[:, number] >> 1)[..., None] + np.arange(8)] = cells

    def _rows(self, mask, base, offset, count, mark, note):
        """(places [warps, count, 8] of rows of 16 bytes, numbers of the active warps).

        The first 8 count threads of a warp name them.
        """
        threads = self.threads
        threads.whole_warps(mask, mark)
        named = np.tile(np.arange(32) < 8 * count, threads.warps)
        if mask is not None:
            named &= threads.full(mask)
        sel = np.flatnonzero(named)
        at = self.shared.places(base, offset, 16, sel, mark)
        note(at, 16, sel, mark)
        return at.reshape(-1, count, 8), np.unique(sel // 32)

    def multiply(self, mask, kind, a, b, c, mark):
        """mma: a [16, k] b [8, k]^T + c, where k is 8 or 16.

        Group g of 4 threads holds rows g and g + 8; its thread t columns 2t and 2t + 1.

        Args:
            mask: active threads. kind: "bf16" or "f16". a, b, c: registers.
            mark: of the instruction.
        """
        threads = self.threads
        threads.whole_warps(mask, mark)
        left = np.empty((threads.warps, 16, 4 * len(a)), np.float32)
        right = np.empty((threads.warps, 8, 8 * len(b)), np.float32)
        for number, register in enumerate(a):
            row, column = number % 2 * 8, number // 2 * 8
            left[:, row : row + 8, column : column + 8] = self._wide(register, kind)
        for number, register in enumerate(b):
            right[:, :, 8 * number : 8 * number + 8] = self._wide(register, kind)
        product = np.matmul(left, right.transpose(0, 2, 1))
        # [warps, 2 halves of rows, 8 groups, 4 threads, 2 columns]
        parts = product.reshape(-1, 2, 8, 4, 2)
        result = []
        for number, register in enumerate(c):
            own = parts[:, number // 2, :, :, number % 2].reshape(-1)
            result.append((own + threads.full(register).view(np.float32)).view(np.uint32))
        return tuple(result)

    def _halves(self, register):
        return np.ascontiguousarray(self.threads.full(register)).view(np.uint16)

    def _wide(self, register, kind):
        return WIDEN[kind](self._halves(register)).reshape(-1, 8, 8)
