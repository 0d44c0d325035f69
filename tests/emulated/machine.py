"""Executes a parsed kernel: many CTAs at once, every instruction on all their threads.

Groups of threads at the same place run together. The one at the lowest place runs first, so that
threads meet again where structured control flow joins. Barriers wait for all threads of a CTA.
What must not happen raises `Trap` with kernel, PTX line, CTA and thread.
"""

import numpy as np
from async_copies import Copies
from global_memory import GlobalMemory
from matrices import Matrices
from ptx_flow import maybe_unwritten, shared_unit
from ptx_text import parse
from ptx_translate import Translator
from shared_memory import SharedMemory
from threads import Threads, Trap
from warpgroup_products import WarpgroupProducts
from warps import Warps

# Where shared memory starts; a GPU's driver keeps what lies before for itself.
SHARED_BASE = 1024
# Threads, and bytes of shared memory, that run at once: what a cache of the CPU holds.
LANES, SHARED_BYTES = 8192, 24 << 20
# Blocks that one batch may run before it counts as endless.
STEPS = 2_000_000


class Program:
    """A kernel made executable: made once, launched often.

    Args:
        text: its PTX. shared: bytes of shared memory of a CTA.
    """

    def __init__(self, text, shared=0):
        self.text, self.kernel = text, parse(text)
        self.opcodes = {ins.name for block in self.kernel.blocks for ins in block.code}
        self.shared = -(-shared // 16) * 16
        self.unit = shared_unit(self.kernel)
        for ins, register in maybe_unwritten(self.kernel):
            message = f"{register.name} may be read before it is written"
            where = f"{self.kernel.name}, PTX line {ins.line}"
            raise Trap("register", f"{where}: {message}; {ins.text}")
        self._translator = Translator(self.kernel, SHARED_BASE)
        self.instructions = self._translator.instructions
        # By (block, masked). All that may run unmasked is translated here: nothing is unknown.
        self._functions, self._sources = {}, {}
        for number in range(len(self.kernel.blocks)):
            self._sources[number, False] = self._translator.source(number, False)
        # {line: instruction} of every function, by its file.
        self.where = {}

    def function(self, number, masked):
        """The function of a block; compiled when it is first wanted."""
        key = (number, masked)
        if key not in self._functions:
            source, where = self._sources.get(key) or self._translator.source(*key)
            file = f"<{self.kernel.name}, block {number}, masked {masked}>"
            self.where[file] = where
            exec(compile(source, file, "exec"), self._translator.scope)
            self._functions[key] = self._translator.scope.pop("run")
        return self._functions[key]

    def launch(self, grid, values, space, counts=None):
        """Run all CTAs of a grid.

        Args:
            grid: CTAs along x, y and z. values: of the parameters, in order.
            space: the `Space` that knows the tensors. counts: `Counts` to add to, or None.
        """
        raw = {}
        for (kind, offset), value in zip(self.kernel.params.values(), values, strict=True):
            dtype = np.dtype(f"{'f' if kind[0] == 'f' else 'u'}{int(kind[1:]) // 8}")
            whole = value if kind[0] == "f" else value & (1 << 8 * dtype.itemsize) - 1
            raw[offset] = dtype.type(whole)
        total = grid[0] * grid[1] * grid[2]
        most = min(LANES // self.kernel.threads, SHARED_BYTES // max(1, self.shared))
        with np.errstate(all="ignore"):
            for start in range(0, total, max(1, most)):
                ctas = np.arange(start, min(total, start + max(1, most)))
                Machine(self, grid, ctas, raw, space, counts).run()


class Machine:
    """Runs some CTAs of a launch together. Compiled blocks call its parts by name."""

    def __init__(self, program, grid, ctas, raw, space, counts):
        self.program, self.raw, self.counts = program, raw, counts
        self.threads = Threads(program, grid, ctas, counts)
        self.special = self.threads.special
        self.memory = GlobalMemory(self.threads, space)
        self.shared = SharedMemory(self.threads, SHARED_BASE)
        self.copies = Copies(self.threads, self.shared, self.memory)
        self.warps = Warps(self.threads)
        self.matrices = Matrices(self.threads, self.shared)
        self.products = WarpgroupProducts(self.threads, self.shared)
        self.registers = [None] * program.kernel.registers
        # Masks of threads by the block where they are, or by the barrier where they wait.
        self.groups, self.waiting = {0: None}, {}

    def param(self, offset, name):
        """A parameter as a value of a numpy type."""
        value, want = self.raw[offset], np.dtype(name)
        size = value.dtype.itemsize
        if want.itemsize == size:
            return value.view(want)
        return value.view(f"{want.kind}{size}").astype(want)

    def run(self):
        blocks, steps = self.program.kernel.blocks, 0
        while self.groups:
            steps += 1
            if steps > STEPS:
                raise Trap("endless", f"{self.program.kernel.name}: more than {STEPS} blocks")
            at = min(self.groups)
            mask, block = self.groups.pop(at), blocks[at]
            taken = self._execute(at, mask)
            if block.end == "fall":
                self._join(block.next, mask)
            elif block.end == "jump":
                self._join(block.target, mask)
            elif block.end == "branch":
                self._branch(block, mask, taken)
            elif block.end == "barrier":
                self._barrier(at, mask)
            else:
                self.threads.alive &= False if mask is None else ~mask
        if self.waiting:
            raise self._not_reached()

    def _execute(self, at, mask):
        program = self.program
        if self.counts:
            self.counts.ran(program.kernel.blocks[at].code, self.threads.active_warps(mask))
        run = program.function(at, mask is not None)
        try:
            return run(self, self.registers, mask)
        except Trap:
            raise
        except Exception as error:
            trace, ins = error.__traceback__, None
            while trace:
                where = program.where.get(trace.tb_frame.f_code.co_filename)
                ins = where[trace.tb_lineno] if where else ins
                trace = trace.tb_next
            text = f"{program.kernel.name}, PTX line {ins.line}: {error!r}; {ins.text}"
            raise Trap("emulator", text) from error

    def _branch(self, block, mask, taken):
        if np.ndim(taken) == 0:
            self._join(block.target if taken else block.next, mask)
            return
        for target, goes in ((block.target, taken), (block.next, ~taken)):
            goes = goes if mask is None else mask & goes
            if goes.any():
                self._join(target, goes)

    def _join(self, at, mask):
        if at in self.groups:
            mask = self.groups[at] | mask
        self.groups[at] = None if mask is None or mask.all() else mask

    def _barrier(self, at, mask):
        threads, following = self.threads, self.program.kernel.blocks[at].next
        if at in self.waiting:
            mask = self.waiting.pop(at) | mask
        if mask is None or mask.all():
            threads.time += 1
            self._join(following, None)
            return
        shape = (len(threads.ctas), threads.per_cta)
        here, live = mask.reshape(shape).sum(1), threads.alive.reshape(shape).sum(1)
        complete = (here == live)[threads.cta] & mask
        threads.time[complete] += 1
        if complete.any():
            self._join(following, complete)
        if (rest := mask & ~complete).any():
            self.waiting[at] = rest

    def _not_reached(self):
        at, mask = next(iter(self.waiting.items()))
        threads = self.threads
        missing = threads.alive & ~mask & np.isin(threads.cta, np.unique(threads.cta[mask]))
        # Nobody is missing where the others have ended, which is no way to use a barrier either.
        lane = int(np.flatnonzero(missing if missing.any() else mask)[0])
        line = self.program.kernel.blocks[at].code[-1].line
        return threads.trap_at("barrier", "not all threads of the CTA reach it", line, lane)
