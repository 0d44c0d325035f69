"""The threads of a batch of CTAs: who they are, which are active, where one is when it traps."""

import numpy as np


class Trap(Exception):
    """A fault of the executed program. kind: a short name of it."""

    def __init__(self, kind, message):
        self.kind = kind
        super().__init__(message)


class Threads:
    """All threads that run together.

    Args:
        program: the `Program` that runs. grid: CTAs along each axis.
        ctas: numbers of those that run. counts: `Counts` to add to, or None.
    """

    def __init__(self, program, grid, ctas, counts=None):
        self.program, self.grid, self.ctas, self.counts = program, grid, ctas, counts
        self.per_cta = program.kernel.threads
        self.size = len(ctas) * self.per_cta
        self.warps = self.size // 32
        self.thread = np.tile(np.arange(self.per_cta, dtype=np.uint32), len(ctas))
        self.cta = np.repeat(np.arange(len(ctas)), self.per_cta)
        # The warp within its CTA, as a bit.
        self.bit = np.left_shift(1, self.thread // 32, dtype=np.int32)
        # Barriers passed, plus 1: nothing that time remembers is ever cleared.
        self.time = np.ones(self.size, np.int32)
        self.alive = np.ones(self.size, bool)
        self._specials = {}

    def full(self, value):
        """A value as an array over all threads."""
        return np.full(self.size, value) if np.ndim(value) == 0 else value

    def selected(self, mask):
        """Numbers of the active threads, None for all."""
        if mask is None or (np.ndim(mask) == 0 and mask):
            return None
        return np.empty(0, np.int64) if np.ndim(mask) == 0 else np.flatnonzero(mask)

    def active_warps(self, mask):
        """How many warps have an active thread."""
        if mask is None:
            return self.warps
        return int(self.full(mask).reshape(-1, 32).any(1).sum())

    def whole_warps(self, mask, mark, width=32):
        """Trap unless every warp (or warpgroup, of 128) is active as a whole or not at all."""
        if mask is None:
            return
        active = self.full(mask).reshape(-1, width)
        bad = active.any(1) & ~active.all(1)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0]) * width
            raise self.trap("divergent", "some threads of a warp are elsewhere", mark, lane)

    def special(self, name):
        """A special register of PTX."""
        if name not in self._specials:
            x, y, z = self.grid
            where = self.ctas[self.cta].astype(np.uint32)
            values = {
                "%tid.x": self.thread,
                "%tid.y": np.uint32(0),
                "%tid.z": np.uint32(0),
                "%ntid.x": np.uint32(self.per_cta),
                "%laneid": self.thread & np.uint32(31),
                "%ctaid.x": where % np.uint32(x),
                "%ctaid.y": where // np.uint32(x) % np.uint32(y),
                "%ctaid.z": where // np.uint32(x * y),
                "%nctaid.x": np.uint32(x),
                "%nctaid.y": np.uint32(y),
                "%nctaid.z": np.uint32(z),
            }
            if name not in values:
                raise NotImplementedError(f"special register {name} is not known")
            self._specials[name] = values[name]
        return self._specials[name]

    def trap(self, kind, message, mark, lane):
        """The `Trap` of a thread at the instruction of a mark."""
        return self.trap_at(kind, message, self.program.instructions[mark].line, lane)

    def trap_at(self, kind, message, line, lane):
        thread, cta = int(self.thread[lane]), int(self.ctas[self.cta[lane]])
        x, y, _ = self.grid
        place = (cta % x, cta // x % y, cta // (x * y))
        kernel = self.program.kernel
        where = f"{kernel.name}, PTX line {line}, CTA {place}, thread {thread}"
        return Trap(kind, f"{where}: {message}; {kernel.at(line)}")

    # What a load leaves in registers. form: (bytes, number, bytes of a register, signed).

    def widened(self, values, form):
        size, _, whole, signed = form
        if size == whole:
            return values
        if signed:
            return values.view(f"i{size}").astype(f"i{whole}").view(f"u{whole}")
        return values.astype(f"u{whole}")

    def placed(self, parts, sel, old, form):
        """Registers with what the selected threads loaded; the others keep theirs."""
        if sel is None:
            return tuple(parts)
        result = []
        for values, before in zip(parts, old or (None,) * len(parts), strict=True):
            new = np.zeros(self.size, f"u{form[2]}") if before is None else self.full(before).copy()
            new[sel] = values
            result.append(new)
        return tuple(result)

    def check_agreement(self, lost, index, sel, mark, where):
        """Trap if several warps wrote different values to one place with one instruction.

        Within a warp that is no fault: threads that hold the same sum may differ in its last bit,
        where the compiler fused the product of one side with a step of a butterfly.

        Args:
            lost: whose value is not there. index: places. sel: the threads. where: for the message.
        """
        if not lost.any():
            return
        places, first = np.unique(index[::-1], return_index=True)
        winner = (len(index) - 1 - first)[np.searchsorted(places, index[lost])]
        loser = np.flatnonzero(lost)
        if sel is not None:
            winner, loser = sel[winner], sel[loser]
        if (bad := winner // 32 != loser // 32).any():
            message = f"two warps write different values to one place of {where} at once"
            raise self.trap("race", message, mark, int(loser[bad][0]))
