"""cp.async: copies from global to shared memory that arrive when their group is waited for."""

from typing import NamedTuple

import numpy as np


class Copy(NamedTuple):
    """Copies of one instruction. group: of each thread, by number. cells: [threads, words]."""

    lanes: np.ndarray
    at: np.ndarray
    cells: np.ndarray
    size: int
    group: np.ndarray

    def of(self, chosen):
        """The copies of some of its threads."""
        parts = (self.lanes, self.at, self.cells)
        return Copy(*(part[chosen] for part in parts), self.size, self.group[chosen])


class Copies:
    def __init__(self, threads, shared, memory):
        self.threads, self.shared, self.memory = threads, shared, memory
        self.flying = []
        # Groups that each thread has committed.
        self.committed = np.zeros(threads.size, np.int64)

    def start(self, mask, to, at, source, offset, size, given, mark):
        """Begin a copy.

        Args:
            mask: active threads. to, at: base and offset in shared memory.
            source, offset: base and offset in global memory. size: bytes of a thread.
            given: how many of them exist, the rest is 0; None for all. mark: of the instruction.
        """
        threads = self.threads
        sel = threads.selected(mask)
        places = self.shared.places(to, at, size, sel, mark)
        self.shared.note_write(places, size, sel, mark)
        lanes = np.arange(threads.size) if sel is None else sel
        many = np.full(len(lanes), size) if given is None else threads.full(given)[lanes]
        if ((many != 0) & (many != size)).any():
            raise NotImplementedError("a copy of a part of its bytes")
        wanted = np.zeros(threads.size, bool)
        wanted[lanes[many != 0]] = True
        cells = np.zeros((len(lanes), size // 4), np.uint32)
        if wanted.any():
            active = None if wanted.all() else wanted
            got = self.memory.load(active, source, offset, (4, size // 4, 4, False), None, mark)
            for k, values in enumerate(got):
                cells[:, k] = np.where(many != 0, values[lanes], 0)
        for i in self.shared.units(places, size):
            self.shared.flying[i] = True
        self.flying.append(Copy(lanes, places, cells, size, self.committed[lanes].copy()))

    def commit(self, mask):
        if mask is None:
            self.committed += 1
        else:
            self.committed[self.threads.full(mask)] += 1

    def wait(self, mask, allowed):
        """Let copies arrive, but for the last `allowed` groups; None waits for all copies."""
        left = []
        for copy in self.flying:
            done = np.ones(len(copy.lanes), bool)
            if allowed is not None:
                done = copy.group < self.committed[copy.lanes] - allowed
            if mask is not None:
                done &= self.threads.full(mask)[copy.lanes]
            if not done.all():
                left.append(copy.of(~done))
            if done.any():
                self._arrive(copy.of(done))
        self.flying = left

    def _arrive(self, copy):
        shared, threads = self.shared, self.threads
        for k in range(copy.size // 4):
            shared.views[4][(copy.at >> 2) + k] = copy.cells[:, k]
        for i in shared.units(copy.at, copy.size):
            shared.flying[i] = False
            # Whoever else reads it needs a barrier first.
            shared.wrote[i] = threads.time[copy.lanes]
            shared.writers[i] = threads.bit[copy.lanes]
            shared.dirty[i] = True
