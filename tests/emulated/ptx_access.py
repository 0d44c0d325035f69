"""What opcodes mean that touch memory or other threads: each becomes one call of the machine.

A handler gets the `Translator`, an instruction and the expression of its active threads, and
returns a statement. The calls are those of `Machine` and its parts.
"""

import re

from ptx_numbers import BYTES, NUMPY
from ptx_text import Register, Unsupported

# Types of a sum and of the two factors.
SUMS = (["f32", "bf16", "bf16"], ["f32", "f16", "f16"])


def _space(ins):
    """ "shared" or "memory", the part of the machine."""
    words = {part.partition("::")[0] for part in ins.op}
    if "shared" in words:
        return "shared"
    if "global" not in words:
        raise Unsupported(ins, "only global and shared memory are known")
    return "memory"


def _load(t, ins, active):
    kind = t.kind(ins)
    if "param" in ins.op:
        source = ins.args[1]
        offset = t.kernel.params[source.base.name][1] + source.offset
        return t.assign(ins, active, [(ins.args[0], f"M.param({offset}, '{NUMPY[kind]}')", kind)])
    space = _space(ins)
    base, offset = t.address(ins, ins.args[1], "u32" if space == "shared" else "u64")
    targets = t.targets(ins, ins.args[0])
    left = "".join(f"R[{register.index}], " for register in targets)
    old = "None" if active == "None" else f"({left})"
    form = (BYTES[kind], len(targets), targets[0].bits // 8, kind[0] == "s")
    call = f"M.{space}.load({active}, {base}, {offset}, {form}, {old}, {t.mark(ins)})"
    return f"{left[:-1]} = {call}"


def _store(t, ins, active):
    values = ins.args[1] if isinstance(ins.args[1], list) else [ins.args[1]]
    size, space = BYTES[t.kind(ins)], _space(ins)
    base, offset = t.address(ins, ins.args[0], "u32" if space == "shared" else "u64")
    parts = "".join(t.read(ins, value, f"b{8 * size}") + ", " for value in values)
    return f"M.{space}.store({active}, {base}, {offset}, {size}, ({parts}), {t.mark(ins)})"


def _load_matrix(t, ins, active):
    targets = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
    base, offset = t.address(ins, ins.args[1], "u32")
    if "b16" not in ins.op or "m8n8" not in ins.op:
        raise Unsupported(ins, "only 8 x 8 matrices of 16 bits are known")
    how = f"{len(targets)}, {'trans' in ins.op}, {t.mark(ins)}"
    call = f"M.matrices.load({active}, {base}, {offset}, {how})"
    return t.assign_all(ins, active, targets, call)


def _store_matrix(t, ins, active):
    base, offset = t.address(ins, ins.args[0], "u32")
    if "b16" not in ins.op or "m8n8" not in ins.op:
        raise Unsupported(ins, "only 8 x 8 matrices of 16 bits are known")
    parts = _parts(t, ins, ins.args[1])
    how = f"{'trans' in ins.op}, {t.mark(ins)}"
    return f"M.matrices.store({active}, {base}, {offset}, {parts}, {how})"


def _parts(t, ins, registers):
    """A tuple of 32-bit operands."""
    registers = registers if isinstance(registers, list) else [registers]
    return "(" + "".join(t.read(ins, one, "b32") + ", " for one in registers) + ")"


def _copy(t, ins, active):
    if ins.op[1:2] != ["async"] or "bulk" in ins.op:
        raise Unsupported(ins, "only cp.async is known")
    if "commit_group" in ins.op:
        return f"M.copies.commit({active})"
    if "wait_group" in ins.op:
        return f"M.copies.wait({active}, {ins.args[0].integer})"
    if "wait_all" in ins.op:
        return f"M.copies.wait({active}, None)"
    to, at = t.address(ins, ins.args[0], "u32")
    source, offset = t.address(ins, ins.args[1], "u64")
    given = t.read(ins, ins.args[3], "u32") if len(ins.args) > 3 else "None"
    where = f"{to}, {at}, {source}, {offset}, {ins.args[2].integer}"
    return f"M.copies.start({active}, {where}, {given}, {t.mark(ins)})"


def _shuffle(t, ins, active):
    target, value, by, clamp, _ = ins.args
    by = t.read(ins, by, "u32") if isinstance(by, Register) else by.integer
    value, mark = t.read(ins, value, "b32"), t.mark(ins)
    call = f"M.warps.shuffle({active}, {value}, '{ins.op[2]}', {by}, {clamp.integer}, {mark})"
    return t.assign(ins, active, [(target, call, "b32")])


def _reduce(t, ins, active):
    kind = t.kind(ins)
    value, mark = t.read(ins, ins.args[1], kind), t.mark(ins)
    call = f"M.warps.reduce({active}, {value}, '{ins.op[2]}', {mark})"
    return t.assign(ins, active, [(ins.args[0], call, kind)])


def _vote(t, ins, active):
    value, mark = t.read(ins, ins.args[1], "pred"), t.mark(ins)
    call = f"M.warps.vote({active}, {value}, '{ins.op[2]}', {mark})"
    kind = "b32" if ins.op[2] == "ballot" else "pred"
    return t.assign(ins, active, [(ins.args[0], call, kind)])


def _product(t, ins, active):
    """mma.sync."""
    shape = next(part for part in ins.op if re.match(r"m\d+n\d+k\d+", part))
    kinds = [part for part in ins.op if part in NUMPY]
    if shape not in ("m16n8k8", "m16n8k16") or kinds not in [[*one, "f32"] for one in SUMS]:
        raise Unsupported(ins, "only m16n8k8 and m16n8k16 of 16-bit floats are known")
    d, *operands = ins.args
    parts = ", ".join(_parts(t, ins, part) for part in operands)
    call = f"M.matrices.multiply({active}, '{kinds[1]}', {parts}, {t.mark(ins)})"
    return t.assign_all(ins, active, d, call)


def _group_product(t, ins, active):
    """wgmma.*."""
    what = ins.op[1]
    if what == "fence":
        return ""
    if what == "commit_group":
        return "M.products.commit()"
    if what == "wait_group":
        return f"M.products.wait({ins.args[0].integer})"
    shape = next(part for part in ins.op if re.match(r"m\d+n\d+k\d+", part))
    columns = re.fullmatch(r"m64n(\d+)k16", shape)
    kinds = [part for part in ins.op if part in NUMPY]
    d, a, b, scale, *rest = ins.args
    signs, majors = [one.integer for one in rest[:2]], [one.integer for one in rest[2:]]
    if columns is None or signs != [1, 1] or kinds not in SUMS:
        raise Unsupported(ins, "only m64n_k16 of 16-bit floats with both signs 1 is known")
    if isinstance(a, list):
        left, majors = _parts(t, ins, a), [0, *majors]
    else:
        left = t.read(ins, a, "b64")
    keep = t.read(ins, scale, "pred")
    # Where the sum starts anew, the registers need not have been written.
    old = "None" if keep == "False" else _parts(t, ins, d)
    operands = f"{old}, {left}, {t.read(ins, b, 'b64')}, {keep}, {majors}"
    call = f"M.products.multiply({active}, {columns[1]}, '{kinds[1]}', {operands}, {t.mark(ins)})"
    return t.assign_all(ins, active, d, call)


def _warp_barrier(t, ins, active):
    return f"M.threads.whole_warps({active}, {t.mark(ins)})"


def _fence(t, ins, active):
    if ins.op[1:3] == ["proxy", "async"]:
        return f"M.shared.fence({active})"
    raise Unsupported(ins, "only fence.proxy.async is known")


HANDLERS = {
    "ld": _load, "st": _store, "ldmatrix": _load_matrix, "stmatrix": _store_matrix, "cp": _copy,
    "shfl": _shuffle, "redux": _reduce, "vote": _vote, "mma": _product, "wgmma": _group_product,
    "bar": _warp_barrier, "fence": _fence,
}  # fmt: skip
