"""Shared memory of a batch of CTAs, one behind the other, and a shadow of every unit of it.

A unit is the kernel's smallest access. Its shadow says whether it was ever written, when and by
which warps it was last written and last read, whether an asynchronous copy to it is in flight, and
whether wgmma may read it. Time is the number of barriers that a thread has passed.
"""

import numpy as np


class SharedMemory:
    def __init__(self, threads, base):
        self.threads, self.base = threads, base
        self.size, self.unit = threads.program.shared, threads.program.unit
        count = max(16, self.size * len(threads.ctas))
        memory = np.full(count, 0xA5, np.uint8)
        self.views = {width: memory.view(f"u{width}") for width in (1, 2, 4, 8)}
        # Where the memory of each thread's CTA starts.
        self.home = threads.cta * self.size
        units = count // self.unit
        self.known, self.flying = np.zeros(units, bool), np.zeros(units, bool)
        self.wrote, self.read = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.writers, self.readers = np.zeros(units, np.int32), np.zeros(units, np.int32)
        # Written without a proxy fence since; read by so many wgmma that are in flight.
        self.dirty, self.reading = np.zeros(units, bool), np.zeros(units, np.int16)

    def places(self, base, offset, width, sel, mark):
        """Where the selected threads' accesses of `width` bytes are in the memory of all CTAs."""
        at = self.threads.full(base)
        at = (at if sel is None else at[sel]).astype(np.int64) + (offset - self.base)
        for kind, bad in (
            ("shared", (at < 0) | (at + width > self.size)),
            ("alignment", at & (width - 1) != 0),
        ):
            if bad.any():
                who = int(np.flatnonzero(bad)[0])
                message = f"{width} bytes at byte {int(at[who])} of {self.size} of shared memory"
                raise self.threads.trap(kind, message, mark, who if sel is None else int(sel[who]))
        if self.threads.counts:
            self.threads.counts.shared(at, width, sel)
        return at + (self.home if sel is None else self.home[sel])

    def units(self, at, width):
        """Numbers of the units of accesses, one array for each of an access's units."""
        first = at // self.unit
        return [first + number for number in range(max(1, width // self.unit))]

    def load(self, mask, base, offset, form, old, mark):
        size, count, _, _ = form
        sel = self.threads.selected(mask)
        at = self.places(base, offset, size * count, sel, mark)
        self.note_read(at, size * count, sel, mark)
        cells, first = self.views[size], at // size
        parts = [self.threads.widened(cells[first + k], form) for k in range(count)]
        return self.threads.placed(parts, sel, old, form)

    def store(self, mask, base, offset, size, values, mark):
        threads = self.threads
        sel = threads.selected(mask)
        at = self.places(base, offset, size * len(values), sel, mark)
        self.note_write(at, size * len(values), sel, mark)
        cells, first = self.views[size], at // size
        for k, value in enumerate(values):
            value = threads.full(value) if sel is None else threads.full(value)[sel]
            cells[first + k] = value
            threads.check_agreement(cells[first + k] != value, first, sel, mark, "shared memory")

    def fence(self, mask):
        """fence.proxy.async: what the active warps wrote may be read by wgmma."""
        if mask is None:
            self.dirty[:] = False
            return
        threads = self.threads
        bits, active = np.zeros(len(threads.ctas), np.int32), threads.full(mask)
        np.bitwise_or.at(bits, threads.cta[active], threads.bit[active])
        every = np.repeat(bits, self.size // self.unit)
        self.dirty[: len(every)] &= self.writers[: len(every)] & every == 0

    # Shadows.

    def note_read(self, at, width, sel, mark):
        """Check and remember a read of the generic proxy."""
        time, bit = self._moment(sel)
        for i in self.units(at, width):
            self._check_flying(i, at, sel, mark)
            recent = self.wrote[i] == time
            # Where several warps wrote the same with one instruction, each may read its own.
            self._check(
                "race", "read after a write of another warp without a barrier between",
                recent & (self.writers[i] & bit == 0), at, sel, mark,
            )  # fmt: skip
            self._check("unwritten", "read, and was never written", ~self.known[i], at, sel, mark)
            self.readers[i[self.read[i] != time]] = 0
            self.read[i] = time
            np.bitwise_or.at(self.readers, i, bit)

    def note_write(self, at, width, sel, mark):
        """Check and remember a write of the generic proxy."""
        time, bit = self._moment(sel)
        for i in self.units(at, width):
            self._check_flying(i, at, sel, mark)
            self._check(
                "wgmma", "written while a wgmma that reads it is in flight",
                self.reading[i] > 0, at, sel, mark,
            )  # fmt: skip
            for when, who, what in (
                (self.wrote, self.writers, "a write"),
                (self.read, self.readers, "a read"),
            ):
                self._check(
                    "race", f"written after {what} of another warp without a barrier between",
                    (when[i] == time) & (who[i] & ~bit != 0), at, sel, mark,
                )  # fmt: skip
            self.wrote[i] = time
            self.writers[i] = 0
            np.bitwise_or.at(self.writers, i, bit)
            self.known[i] = self.dirty[i] = True

    def _moment(self, sel):
        time, bit = self.threads.time, self.threads.bit
        return (time, bit) if sel is None else (time[sel], bit[sel])

    def _check_flying(self, i, at, sel, mark):
        self._check(
            "copy", "touched while an asynchronous copy to it is in flight",
            self.flying[i], at, sel, mark,
        )  # fmt: skip

    def _check(self, kind, message, bad, at, sel, mark):
        if bad.any():
            who = int(np.flatnonzero(bad)[0])
            place = f"byte {int(at[who]) % self.size} of shared memory"
            lane = who if sel is None else int(sel[who])
            raise self.threads.trap(kind, f"{place}: {message}", mark, lane)
