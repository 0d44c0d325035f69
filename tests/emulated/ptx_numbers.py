"""How PTX types are stored, and arithmetic that numpy lacks, on arrays or numpy scalars."""

import numpy as np

NUMPY = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2",
    "f16": "f2", "bf16": "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8",
    "u64": "u8", "s64": "i8", "f64": "f8", "f16x2": "u4", "bf16x2": "u4",
}  # fmt: skip
BYTES = {kind: np.dtype(name).itemsize for kind, name in NUMPY.items()}

f4, f8, u2, u4, u8 = np.float32, np.float64, np.uint16, np.uint32, np.uint64


def fma(a, b, c):
    """a b + c; the product is exact in float64, the sum is rounded twice in 1 of 2^29 cases."""
    wide = np.asarray(a).astype(f8) * np.asarray(b).astype(f8) + np.asarray(c).astype(f8)
    return wide.astype(f4)


def flushed(a):
    """Subnormal float32 as zeros of their sign."""
    return np.where(np.abs(a) < f4(2.0**-126), np.copysign(f4(0), a), a)


def negated(a):
    return not a if isinstance(a, bool) else ~a


def reciprocal(a):
    return f4(1) / a


def reciprocal_root(a):
    return f4(1) / np.sqrt(a)


def quotient(a, b):
    """Of integers, towards zero; wide enough for 32 bits."""
    if a.dtype.kind == "u":
        return a // b
    return np.trunc(a.astype(f8) / b.astype(f8)).astype(a.dtype)


def remainder(a, b):
    return a % b if a.dtype.kind == "u" else a - quotient(a, b) * b


def shifted(a, count, way):
    bits = a.dtype.itemsize * 8
    small = np.minimum(count, u4(bits - 1)).astype(a.dtype)
    if way == "left":
        return np.where(count >= bits, a.dtype.type(0), a << small)
    moved = a >> small
    return moved if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), moved)


def funnel_shifted(low, high, count, way, mode):
    n = (np.minimum(count, u4(32)) if mode == "clamp" else count & u4(31)).astype(u8)
    both = high.astype(u8) << u8(32) | low.astype(u8)
    return (both >> n if way == "r" else (both << n) >> u8(32)).astype(u4)


def table_of_three(a, b, c, table):
    """lop3: any function of three bits, as a table of its 8 values."""
    result = a & u4(0)
    for i in range(8):
        if table >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | term
    return result


def permuted(a, b, selector):
    """prmt: four bytes of two registers; bit 3 of a selector's nibble repeats the byte's sign."""
    both = a.astype(u8) | b.astype(u8) << u8(32)
    result = u4(0)
    for i in range(4):
        nibble = selector >> u4(4 * i) & u4(15)
        byte = (both >> ((nibble & u4(7)) * u4(8)).astype(u8)).astype(u4) & u4(255)
        byte = np.where(nibble & u4(8), (byte >> u4(7)) * u4(255), byte)
        result = result | byte << u4(8 * i)
    return result


def to_bf16(a):
    bits = np.asarray(a).view(u4)
    rounded = (bits + (u4(0x7FFF) + (bits >> u4(16) & u4(1)))) >> u4(16)
    return np.where(np.isnan(a), u2(0x7FFF), rounded.astype(u2))


def from_bf16(a):
    return (np.asarray(a).astype(u4) << u4(16)).view(f4)


def to_f16(a):
    return np.where(np.isnan(a), u2(0x7FFF), np.asarray(a).astype(np.float16).view(u2))


def from_f16(a):
    return np.asarray(a).view(np.float16).astype(f4)


def pair(high, low):
    return high.astype(u4) << u4(16) | low.astype(u4)


def to_integer(a, name):
    """A whole float as an integer, at most its largest; NaN is 0."""
    info = np.iinfo(name)
    # The largest 64-bit integers are no float64; nothing here comes near them.
    wide = np.clip(a.astype(f8), float(info.min), float(info.max))
    return np.where(np.isnan(a), 0, wide).astype(name)


def packed(kind, sign, *args):
    """Arithmetic of 16-bit floats, one or two in a register: computed wide, rounded once."""
    wide, back = (from_bf16, to_bf16) if "bf16" in kind else (from_f16, to_f16)
    results = []
    for part in range(2 if kind.endswith("x2") else 1):
        # The lower half first.
        x = [wide((np.asarray(a) >> (16 * part)).astype(u2)).astype(f8) for a in args]
        result = {
            "+": lambda x: x[0] + x[1],
            "-": lambda x: x[0] - x[1],
            "*": lambda x: x[0] * x[1],
            "fma": lambda x: x[0] * x[1] + x[2],
        }[sign](x)
        results.append(back(result.astype(f4)))
    return results[0] if len(results) == 1 else pair(results[1], results[0])


def both(active, guard):
    """The active threads for which a guard holds; None for all."""
    if np.ndim(guard) == 0:
        return active if guard else np.False_
    return guard if active is None else active & guard


def merged(active, new, old):
    """A register after a write by the active threads."""
    return new if old is None or active is None else np.where(active, new, old)


def all_merged(active, new, old):
    return tuple(merged(active, *pair) for pair in zip(new, old, strict=True))


HELPERS = (
    fma, flushed, negated, reciprocal, reciprocal_root, quotient, remainder, shifted,
    funnel_shifted, table_of_three, permuted, to_bf16, from_bf16, to_f16, pair, to_integer, packed,
    both, merged, all_merged,
)  # fmt: skip
