"""What a parsed kernel says before it runs: registers read unwritten, the unit of shared memory."""

from ptx_numbers import BYTES
from ptx_text import Address, Register

# Opcodes whose first operand is no register that they write.
NO_RESULT = {"st", "bra", "ret", "exit", "bar", "barrier", "stmatrix", "cp", "fence", "membar"}


def maybe_unwritten(kernel):
    """[(instruction, register)] that may be read before anything was written to it.

    A must-analysis over the control flow; a guarded write counts as none.
    """
    every = (1 << kernel.registers) - 1
    before = dict.fromkeys(range(len(kernel.blocks)), every)
    before[0] = 0
    queue, seen = [0], {0}
    while queue:
        number = queue.pop()
        block = kernel.blocks[number]
        after, _ = _through(block, before[number])
        following = {block.target} if block.end in ("jump", "branch") else set()
        if block.end in ("fall", "branch", "barrier"):
            following.add(block.next)
        for other in following - {None}:
            merged = before[other] & after
            if merged != before[other] or other not in seen:
                before[other] = merged
                seen.add(other)
                queue.append(other)
    return [
        pair
        for number in sorted(seen)
        for pair in _through(kernel.blocks[number], before[number])[1]
    ]


def _through(block, known):
    """(registers written after a block, as bits; reads of others)."""
    found = []
    for ins in block.code:
        reads, writes = _reads_and_writes(ins)
        found += [(ins, register) for register in reads if not known >> register.index & 1]
        if not ins.guard:
            for register in writes:
                known |= 1 << register.index
    return known, found


def _reads_and_writes(ins):
    stores = ins.name in NO_RESULT or (ins.name == "wgmma" and ins.op[1] != "mma_async")
    sources = ins.args if stores else ins.args[1:]
    reads = [register for arg in sources for register in _registers(arg)]
    if ins.guard:
        reads.append(ins.guard[0])
    return reads, [] if stores or not ins.args else list(_registers(ins.args[0]))


def _registers(arg):
    if isinstance(arg, Register):
        yield arg
    elif isinstance(arg, list):
        for part in arg:
            yield from _registers(part)
    elif isinstance(arg, Address):
        yield from _registers(arg.base)


def shared_unit(kernel):
    """Bytes of the smallest access to shared memory, 16 at most: what shadows count."""
    unit = 16
    for ins in (ins for block in kernel.blocks for ins in block.code):
        if ins.name in ("ld", "st") and "shared" in {part.partition("::")[0] for part in ins.op}:
            value = ins.args[0] if ins.name == "ld" else ins.args[1]
            count = len(value) if isinstance(value, list) else 1
            size = BYTES[next(part for part in reversed(ins.op) if part in BYTES)]
            unit = min(unit, size * count)
        elif ins.name == "cp" and len(ins.args) > 2:
            unit = min(unit, ins.args[2].integer)
    return unit
