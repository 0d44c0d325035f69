"""`Kernel` -> Python: one function per basic block, one line per instruction.

Registers are a list R of arrays over all threads of a batch of CTAs, or numpy scalars where all
threads agree: bool, uint8, uint16, uint32 or uint64 by their size. No array is changed in place, so
that a move costs nothing. m is the mask of active threads, None for all. Every block exists twice,
for all threads and for some of them. What an opcode means is in `ptx_arithmetic`, `ptx_access`.
"""

import re

import numpy as np
import ptx_access
import ptx_arithmetic
from ptx_numbers import BYTES, HELPERS, NUMPY
from ptx_text import Literal, Register, Symbol, Unsupported

# Parts of opcodes that handlers look at, or that mean nothing here: rounding to nearest, caches.
MODIFIERS = """
    rn rni rzi rmi rpi ftz approx full lo hi wide to l r clamp wrap NaN uni
    eq ne lt le gt ge ls hs equ neu ltu leu gtu geu num nan and or xor
    global param shared v2 v4 v8 nc row col x1 x2 x4 trans m8n8 cg ca async
    sync aligned bfly up down idx ballot any all min max add warp bar
    commit_group wait_group wait_all fence mma_async proxy cta
"""
KNOWN = {*NUMPY, *MODIFIERS.split()}
HINTS = re.compile(r"(L1|L2|shared)::\w+|m\d+n\d+k\d+")


class Translator:
    """Writes the functions of a kernel.

    Args:
        kernel: a parsed one. shared_base: address at which shared memory starts.
    """

    def __init__(self, kernel, shared_base):
        self.kernel, self.shared_base = kernel, shared_base
        # The names that functions use: helpers, and constants as they come up.
        self.scope = {function.__name__: function for function in HELPERS} | {"np": np}
        self._constants = {}
        # What the machine is told of where it is: indices into this list.
        self.instructions = []

    def source(self, number, masked):
        """(Python of a block's function `run`, {line of it: instruction})."""
        lines, where, result = ["def run(M, R, m):"], {}, "None"
        for ins in self.kernel.blocks[number].code:
            if ins.ends_block():
                result = self._end(ins)
            elif text := self._statement(ins, masked):
                lines.append("    " + text)
                where[len(lines)] = ins
        return "\n".join([*lines, f"    return {result}"]), where

    def _end(self, ins):
        if ins.name == "bra" and ins.guard:
            return self.guard(ins)
        if ins.guard:
            raise Unsupported(ins, "only branches may be guarded")
        if ins.name in ("bar", "barrier") and (len(ins.args) > 1 or ins.args[0].integer != 0):
            raise Unsupported(ins, "only barrier 0 of all threads is known")
        return "None"

    def _statement(self, ins, masked):
        for part in ins.op[1:]:
            if part not in KNOWN and not HINTS.fullmatch(part):
                raise Unsupported(ins, f"{part!r} is not known")
        if "ftz" in ins.op and ins.name not in ptx_arithmetic.FLUSHING:
            raise Unsupported(ins, "'ftz' is not known here")
        active = "m" if masked else "None"
        if ins.guard:
            active = f"both({active}, {self.guard(ins)})"
        if handler := ptx_access.HANDLERS.get(ins.name):
            return handler(self, ins, active)
        if handler := ptx_arithmetic.HANDLERS.get(ins.name):
            return self.assign(ins, active, handler(self, ins))
        raise Unsupported(ins, "the opcode is not known")

    # Operands.

    def kind(self, ins):
        """The type that an opcode ends with."""
        return next(part for part in reversed(ins.op) if part in NUMPY)

    def guard(self, ins):
        register, negative = ins.guard
        return f"negated(R[{register.index}])" if negative else f"R[{register.index}]"

    def constant(self, value):
        key = (value.dtype.str, value.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"K{len(self._constants)}"
            self.scope[name] = value
        return self._constants[key]

    def integer(self, value, kind):
        """A Python integer as a constant of a PTX type."""
        want = np.dtype(NUMPY[kind])
        bits = value & (1 << want.itemsize * 8) - 1
        return self.constant(np.dtype(f"u{want.itemsize}").type(bits).view(want))

    def read(self, ins, arg, kind):
        """An expression of an operand as a value of a PTX type."""
        want, size = NUMPY[kind], BYTES[kind]
        if isinstance(arg, Register):
            text = f"R[{arg.index}]"
            if kind == "pred":
                return text
            if arg.bits < 8 * size:
                raise Unsupported(ins, f"{arg.name} is read as {kind}")
            if arg.bits > 8 * size:
                text += f".astype('u{size}')"
            return text if want[0] == "u" else f"{text}.view('{want}')"
        if isinstance(arg, Literal):
            if kind == "pred":
                return str(bool(arg.integer))
            if re.match("0[fFdD]", arg.text):
                if len(arg.text) != 2 + 2 * size:
                    raise Unsupported(ins, f"{arg.text} is no {kind}")
                return self.integer(int(arg.text[2:], 16), kind)
            return self.integer(arg.integer, kind)
        if isinstance(arg, Symbol) and arg.name in self.kernel.symbols:
            return self.integer(self.shared_base, kind)
        if isinstance(arg, Symbol) and arg.name.startswith("%"):
            return f"M.special('{arg.name}')"
        raise Unsupported(ins, f"operand {arg} is not known")

    def address(self, ins, arg, kind):
        """(expression of the base, offset) of a memory operand."""
        return self.read(ins, arg.base, kind), arg.offset

    def mark(self, ins):
        """The number by which the machine finds an instruction again."""
        self.instructions.append(ins)
        return len(self.instructions) - 1

    # Results.

    def targets(self, ins, arg):
        """The registers that an instruction writes."""
        registers = arg if isinstance(arg, list) else [arg]
        if not all(isinstance(register, Register) for register in registers):
            raise Unsupported(ins, "a result is no register")
        return registers

    def assign(self, ins, active, results):
        """Statement for results (register, expression, type) of each."""
        for register, _, _ in results:
            self.targets(ins, register)
        left = ", ".join(f"R[{register.index}]" for register, _, _ in results)
        stored = [self._stored(*result) for result in results]
        if active == "None":
            return f"{left} = {', '.join(stored)}"
        pairs = zip(results, stored, strict=True)
        right = ", ".join(f"merged(q, {text}, R[{r.index}])" for (r, _, _), text in pairs)
        return f"q = {active}; {left} = {right}"

    def _stored(self, register, text, kind):
        """An expression of a PTX type as a register keeps it."""
        want, size, whole = NUMPY[kind], BYTES[kind], register.bits // 8
        if kind == "pred":
            return text
        if want[0] == "u":
            return text if size == whole else f"({text}).astype('u{whole}')"
        if size == whole:
            return f"({text}).view('u{whole}')"
        # Loads and conversions into wider registers extend by sign or with zeros.
        wide = "i" if want[0] == "i" else "u"
        return f"({text}).astype('{wide}{whole}').view('u{whole}')"

    def assign_all(self, ins, active, targets, call):
        """Statement for one call that returns the 32-bit values of several registers."""
        left = "".join(f"R[{register.index}], " for register in self.targets(ins, targets))
        if active == "None":
            return f"{left[:-1]} = {call}"
        return f"{left[:-1]} = all_merged({active}, {call}, ({left}))"
