"""What a launch executes: warp instructions by class, bytes, sectors, conflicts of banks.

Instructions are those of PTX. Machine code has fewer moves and more address arithmetic.
"""

from collections import Counter

import numpy as np

SECTOR = 32
# Classes of opcodes; what is in none of them is arithmetic.
CLASSES = {
    "product": ("mma", "wgmma"),
    "copy": ("cp",),
    "shuffle": ("shfl", "redux", "vote"),
    "special": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "div"),
    "barrier": ("bar", "barrier", "fence"),
    "branch": ("bra", "ret", "exit"),
    "move": ("mov",),
    "matrix": ("ldmatrix", "stmatrix"),
}
_CLASS = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}


def class_of(ins):
    """The class of an instruction."""
    if ins.name in ("ld", "st"):
        where = {part.partition("::")[0] for part in ins.op} & {"global", "shared", "param"}
        return where.pop()
    return _CLASS.get(ins.name, "arithmetic")


class Counts:
    """Sums over the launches that it was given to.

    instructions: of warps, by class. tensors: by (name, "load" or "store"): bytes that threads ask
    for, bytes of the sectors that a warp's instruction touches, and instructions of warps.
    wavefronts, ideal: passes over shared memory, and how many without conflicts.
    """

    def __init__(self):
        self.instructions, self.tensors = Counter(), {}
        self.wavefronts = self.ideal = 0
        self._classes = {}

    def ran(self, code, warps):
        """Add a block of instructions that so many warps ran."""
        key = id(code)
        if key not in self._classes:
            # The block is kept, so that nothing else gets its id.
            self._classes[key] = code, Counter(map(class_of, code))
        for name, count in self._classes[key][1].items():
            self.instructions[name] += count * warps

    def touched(self, name, at, width, lanes, stores):
        """Add an access to global memory.

        Args:
            name: of the tensor. at: bytes [threads] from an aligned address. width: bytes each.
            lanes: numbers of the threads, None for all. stores: whether they write.
        """
        lanes = np.arange(len(at)) if lanes is None else lanes
        warp = lanes.astype(np.int64) // 32
        # Accesses are aligned to their width, which no sector is smaller than.
        sectors = len(np.unique(warp << 48 | at // SECTOR))
        totals = self.tensors.setdefault((name, "store" if stores else "load"), Counter())
        totals.update(
            asked=len(at) * width, moved=sectors * SECTOR, instructions=len(np.unique(warp))
        )

    def shared(self, at, width, sel):
        """Add an access to shared memory; `touched` says what the arguments are.

        As many threads as have 128 bytes go at once, and each bank gives one word of 4 bytes.
        """
        lanes = np.arange(len(at)) if sel is None else sel
        group = lanes.astype(np.int64) // (32 * 4 // max(4, width))
        words = at[:, None] // 4 + np.arange(max(1, width // 4))
        pairs = np.unique(group[:, None] << 32 | words)
        group, bank = pairs >> 32, pairs % 32
        _, start = np.unique(group, return_index=True)
        passes, number = np.unique(group << 8 | bank, return_counts=True)
        _, first = np.unique(passes >> 8, return_index=True)
        self.wavefronts += int(np.maximum.reduceat(number, first).sum())
        self.ideal += len(start)
