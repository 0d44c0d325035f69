"""What opcodes of single threads mean: arithmetic, comparisons, conversions, moves.

A handler gets the `Translator` and an instruction, and returns (register, expression, type) of
every result. Threads know nothing of each other here, nor of memory.
"""

import numpy as np
from ptx_numbers import BYTES, NUMPY
from ptx_text import Literal, Symbol, Unsupported

SIXTEEN = ("f16", "bf16", "f16x2", "bf16x2")
ROUNDINGS = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
SIGNS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=", "neu": "!=",
}  # fmt: skip
# Comparisons that hold where one side is NaN: what must not hold.
UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}

# Opcodes whose handlers know that subnormal numbers may count as zero.
FLUSHING = {"add", "sub", "mul", "cvt", "ex2", "lg2", "sqrt", "rsqrt", "rcp", "tanh"}


def _result(t, ins, pattern, kind=None):
    """A pattern of {a}, {b}, {c}: the operands, all of one type."""
    kind = kind or t.kind(ins)
    names = {name: t.read(ins, arg, kind) for name, arg in zip("abcd", ins.args[1:], strict=False)}
    return [(ins.args[0], pattern.format(**names), kind)]


def _pattern(pattern):
    return lambda t, ins: _result(t, ins, pattern)


def _float_or_integer(floats, integers):
    def handler(t, ins):
        kind = t.kind(ins)
        if kind in SIXTEEN:
            raise Unsupported(ins, f"not known for {kind}")
        quiet = kind[0] == "f" and "NaN" not in ins.op
        return _result(t, ins, floats if quiet else integers)

    return handler


def _move(t, ins):
    target, source = ins.args
    kind = t.kind(ins)
    want = NUMPY[kind]
    if isinstance(target, list):
        part = f"b{BYTES[kind] * 8 // len(target)}"
        whole = t.read(ins, source, kind)
        return [
            (
                one,
                f"({whole} >> {t.integer(8 * BYTES[part] * i, kind)}).astype('{NUMPY[part]}')",
                part,
            )
            for i, one in enumerate(target)
            if one != Symbol("_")
        ]
    if isinstance(source, list):
        part = f"b{BYTES[kind] * 8 // len(source)}"
        pieces = [
            f"({t.read(ins, one, part)}.astype('{want}') << {t.integer(8 * BYTES[part] * i, kind)})"
            for i, one in enumerate(source)
        ]
        return [(target, " | ".join(pieces), kind)]
    return [(target, t.read(ins, source, kind), kind)]


def _sum(sign):
    def handler(t, ins):
        kind = t.kind(ins)
        if kind in SIXTEEN:
            names = ", ".join(
                t.read(ins, a, "b16" if BYTES[kind] == 2 else kind) for a in ins.args[1:]
            )
            return [(ins.args[0], f"packed('{kind}', '{sign}', {names})", f"b{8 * BYTES[kind]}")]
        if "ftz" in ins.op:
            return _result(t, ins, f"flushed(flushed({{a}}) {sign} flushed({{b}}))")
        return _result(t, ins, f"{{a}} {sign} {{b}}")

    return handler


def _product(t, ins):
    kind = t.kind(ins)
    if "wide" in ins.op or "hi" in ins.op:
        wide = f"{kind[0]}{16 * BYTES[kind]}"
        if wide not in NUMPY:
            raise Unsupported(ins, f"no type is twice as wide as {kind}")
        a, b = (f"{t.read(ins, arg, kind)}.astype('{NUMPY[wide]}')" for arg in ins.args[1:3])
        if "wide" in ins.op:
            return [(ins.args[0], f"{a} * {b}", wide)]
        shift = t.integer(8 * BYTES[kind], wide)
        return [(ins.args[0], f"(({a} * {b}) >> {shift}).astype('{NUMPY[kind]}')", kind)]
    return _sum("*")(t, ins)


def _product_and_sum(t, ins):
    kind = t.kind(ins)
    if "wide" in ins.op:
        ((_, product, wide),) = _product(t, ins)
        return [(ins.args[0], f"{product} + {t.read(ins, ins.args[3], wide)}", wide)]
    if "hi" in ins.op or kind[0] == "f":
        raise Unsupported(ins, "only mad.lo and mad.wide of integers are known")
    return _result(t, ins, "{a} * {b} + {c}")


def _fma(t, ins):
    kind = t.kind(ins)
    if kind in SIXTEEN:
        return _sum("fma")(t, ins)
    return _result(t, ins, "fma({a}, {b}, {c})" if kind == "f32" else "{a} * {b} + {c}")


def _division(t, ins):
    return _result(t, ins, "{a} / {b}" if t.kind(ins)[0] == "f" else "quotient({a}, {b})")


def _sign(pattern):
    def handler(t, ins):
        if t.kind(ins) in SIXTEEN:
            raise Unsupported(ins, "not known for 16-bit floats")
        return _result(t, ins, pattern)

    return handler


def _unary(name):
    def handler(t, ins):
        text = f"flushed({name}(flushed({{a}})))" if "ftz" in ins.op else f"{name}({{a}})"
        return _result(t, ins, text)

    return handler


def _population(t, ins):
    text = t.read(ins, ins.args[1], t.kind(ins))
    return [(ins.args[0], f"np.bitwise_count({text}).astype('u4')", "b32")]


def _lop3(t, ins):
    a, b, c = (t.read(ins, arg, "b32") for arg in ins.args[1:4])
    return [(ins.args[0], f"table_of_three({a}, {b}, {c}, {ins.args[4].integer})", "b32")]


def _shift(way, sign):
    def handler(t, ins):
        kind, count = t.kind(ins), ins.args[2]
        if isinstance(count, Literal) and 0 <= count.integer < BYTES[kind] * 8:
            a, by = t.read(ins, ins.args[1], kind), t.integer(count.integer, kind)
            return [(ins.args[0], f"{a} {sign} {by}", kind)]
        a, by = t.read(ins, ins.args[1], kind), t.read(ins, count, "u32")
        return [(ins.args[0], f"shifted({a}, {by}, '{way}')", kind)]

    return handler


def _extract(t, ins):
    kind, bits = t.kind(ins), 8 * BYTES[t.kind(ins)]
    at, count = (arg.integer for arg in ins.args[2:])
    if not 0 < count <= bits - at:
        raise Unsupported(ins, "bits outside of the register")
    a = t.read(ins, ins.args[1], kind)
    left, right = t.integer(bits - at - count, kind), t.integer(bits - count, kind)
    return [(ins.args[0], f"({a} << {left}) >> {right}", kind)]


def _insert(t, ins):
    a, b = (t.read(ins, arg, "b32") for arg in ins.args[1:3])
    at, count = (arg.integer for arg in ins.args[3:])
    mask = (1 << count) - 1 << at
    put, keep, by = (t.constant(np.uint32(n & 0xFFFFFFFF)) for n in (mask, ~mask, at))
    return [(ins.args[0], f"({b} & {keep}) | (({a} << {by}) & {put})", "b32")]


def _funnel(t, ins):
    a, b, c = (t.read(ins, arg, "b32") for arg in ins.args[1:4])
    return [(ins.args[0], f"funnel_shifted({a}, {b}, {c}, '{ins.op[1]}', '{ins.op[2]}')", "b32")]


def _select(t, ins):
    kind = t.kind(ins)
    a, b = (t.read(ins, arg, kind) for arg in ins.args[1:3])
    return [(ins.args[0], f"np.where({t.read(ins, ins.args[3], 'pred')}, {a}, {b})", kind)]


def _compare(t, ins):
    how, kind = ins.op[1], t.kind(ins)
    if kind in SIXTEEN:
        raise Unsupported(ins, "not known for 16-bit floats")
    a, b = (t.read(ins, arg, kind) for arg in ins.args[1:3])
    if how in ("num", "nan"):
        text = f"({a} == {a}) & ({b} == {b})"
        text = f"negated({text})" if how == "nan" else text
    elif kind[0] == "f" and how in ("ne", "equ"):
        text = f"({a} < {b}) | ({a} > {b})"
        text = f"negated({text})" if how == "equ" else text
    elif how in UNORDERED:
        text = f"negated({a} {UNORDERED[how]} {b})"
    elif how in SIGNS:
        text = f"{a} {SIGNS[how]} {b}"
    else:
        raise Unsupported(ins, f"{how!r} is no comparison")
    if len(ins.op) > 3 and ins.op[2] in ("and", "or", "xor"):
        sign = {"and": "&", "or": "|", "xor": "^"}[ins.op[2]]
        text = f"({text}) {sign} {t.read(ins, ins.args[3], 'pred')}"
    return [(ins.args[0], text, "pred")]


def _convert(t, ins):
    to, source = (part for part in ins.op if part in NUMPY)
    target = ins.args[0]
    if to in ("bf16x2", "f16x2"):
        a, b = (t.read(ins, arg, "f32") for arg in ins.args[1:])
        half = "to_bf16" if to == "bf16x2" else "to_f16"
        return [(target, f"pair({half}({a}), {half}({b}))", "b32")]
    a = t.read(ins, ins.args[1], source)
    if "ftz" in ins.op and source == "f32":
        a = f"flushed({a})"
    if "bf16" in (to, source):
        if {to, source} != {"bf16", "f32"}:
            raise Unsupported(ins, "bfloat16 is known to come from float32 and to become it")
        return [
            (target, f"to_bf16({a})", "b16") if to == "bf16" else (target, f"from_bf16({a})", "f32")
        ]
    rounding = next((ROUNDINGS[part] for part in ins.op if part in ROUNDINGS), None)
    if rounding:
        a = f"np.{rounding}({a})"
    if to[0] == "f" or source[0] != "f":
        return [(target, f"{a}.astype('{NUMPY[to]}')", to)]
    if not rounding:
        raise Unsupported(ins, "a float becomes an integer without a rounding")
    return [(target, f"to_integer({a}, '{NUMPY[to]}')", to)]


def _address(t, ins):
    return [(ins.args[0], t.read(ins, ins.args[1], "u64"), "u64")]


HANDLERS = {
    "mov": _move, "add": _sum("+"), "sub": _sum("-"), "mul": _product, "mad": _product_and_sum,
    "fma": _fma, "div": _division, "rem": _pattern("remainder({a}, {b})"),
    "min": _float_or_integer("np.fmin({a}, {b})", "np.minimum({a}, {b})"),
    "max": _float_or_integer("np.fmax({a}, {b})", "np.maximum({a}, {b})"),
    "neg": _sign("-{a}"), "abs": _sign("abs({a})"), "and": _pattern("{a} & {b}"),
    "or": _pattern("{a} | {b}"), "xor": _pattern("{a} ^ {b}"), "not": _pattern("negated({a})"),
    "popc": _population, "lop3": _lop3, "shl": _shift("left", "<<"), "shr": _shift("right", ">>"),
    "bfe": _extract, "bfi": _insert, "shf": _funnel,
    "prmt": lambda t, ins: _result(t, ins, "permuted({a}, {b}, {c})"),
    "selp": _select, "setp": _compare, "cvt": _convert, "cvta": _address,
    "ex2": _unary("np.exp2"), "lg2": _unary("np.log2"), "sqrt": _unary("np.sqrt"),
    "rsqrt": _unary("reciprocal_root"), "rcp": _unary("reciprocal"), "tanh": _unary("np.tanh"),
}  # fmt: skip
