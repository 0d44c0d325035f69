"""What Triton's interpreter gets wrong is mended here, and what it hides is made visible.

Triton 3.8's interpreter multiplies the bit patterns of bfloat16 and truncates to it instead of
rounding; both are mended. It multiplies float32 exactly whatever `input_precision` says; here
"tf32" (the default on a GPU), "bf16x3" and "bf16x6" round as the hardware does, and products are
counted. It also gets four times as fast: Triton swaps the whole language anew at every call of a
device function, and looks for overflow in every sum of integers.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as plain
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# How many tl.dot of float32 operands ran, by the lower-case name of their precision.
products = Counter()

_plain_cast, _plain_patch = InterpreterBuilder.cast_impl, plain._patch_lang
# Seen by Triton as a function that uses every module whose functions have to be swapped.
_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def install():
    """Mend the interpreter of this process; doing it again changes nothing."""
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.cast_impl = _cast
    plain._patch_lang = _patch_once
    allowed = (*plain.InterpreterOptions.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    builder = plain.interpreter_builder
    # No offset of a small problem overflows, and looking for it triples the work on integers.
    builder.options = replace(
        builder.options, allowed_dot_input_precisions=allowed, sanitize_overflow=False
    )


@contextmanager
def looking_for_overflow():
    """Within the block a sum or product of integers that leaves its 32 bits is an error."""
    builder = plain.interpreter_builder
    quick = builder.options
    builder.options = replace(quick, sanitize_overflow=True, debug=True)
    try:
        yield
    finally:
        builder.options = quick


def to_bfloat16(numbers):
    """float32 rounded to nearest even, as the bits of bfloat16 in uint16."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers of the bits of bfloat16."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_tf32(numbers):
    """float32 rounded to nearest even with 10 bits after the point, as tensor cores take it."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x0FFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), rounded.view(np.float32), numbers)


def bf16x6(left, right):
    """The float32 product from six products of bfloat16 parts, the small ones added first."""
    (a, b, c), (d, e, f) = _parts(left), _parts(right)
    small = np.matmul(b, e) + np.matmul(c, d) + np.matmul(a, f)
    small = small + np.matmul(b, d) + np.matmul(a, e)
    # An infinite operand leaves NaN in the small parts; Triton drops those.
    return np.where(np.isnan(small), np.float32(0), small) + np.matmul(a, d)


def bf16x3(left, right):
    """The float32 product from three products of two bfloat16 parts each, the small ones first."""
    (a, b, _), (d, e, _) = _parts(left), _parts(right)
    small = np.matmul(b, d) + np.matmul(a, e)
    return np.where(np.isnan(small), np.float32(0), small) + np.matmul(a, d)


PARTS = {"bf16x3": bf16x3, "bf16x6": bf16x6}


def _parts(numbers):
    rest, parts = numbers, []
    for _ in range(3):
        parts.append(from_bfloat16(to_bfloat16(rest)))
        rest = rest - parts[-1]
    return parts


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    operands, (left, right) = (a, b), (a.data, b.data)
    left, right = (
        from_bfloat16(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data
        for handle in operands
    )
    left, right = left.astype(np.float32, copy=False), right.astype(np.float32, copy=False)
    if a.dtype.scalar == tl.float32:
        precision = input_precision.name.lower()
        products[precision] += 1
        if precision == "tf32":
            left, right = to_tf32(left), to_tf32(right)
        if precision in PARTS:
            return TensorHandle(PARTS[precision](left, right) + d.data, d.dtype.scalar)
    return TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


def _cast(self, src, dst_type):
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(from_bfloat16(src.data), tl.float32)
    return _plain_cast(self, src, dst_type)


def _patch_once(fn):
    """Swap the language for a launch; device functions that it calls find it swapped."""
    if _Scope.active:
        return plain._LangPatchScope()
    scope = _Scope()
    scope.inner = _plain_patch(_EVERYTHING)
    _Scope.active = True
    return scope


class _Scope:
    active = False

    def restore(self):
        self.inner.restore()
        _Scope.active = False
