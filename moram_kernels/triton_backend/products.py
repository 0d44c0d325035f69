"""The product of two register tiles in the dtype that a launcher chose, on tensor cores.

Where bfloat16 meets float32, as 16-bit inputs meet float32 atoms, the float32 numbers are split
into three bfloat16 ones of 8 bits each: no bit is lost, and three products are as exact as a
float32 one.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b.

    Args:
        a: [rows, inner]. b: [inner, columns]. acc: float32 [rows, columns].
        DOT: the dtype in which a and b meet.
        PRECISION: of float32 products; "ieee" forgoes tensor cores even where one has bfloat16.
    """
    if PRECISION != "ieee" and a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, middle, low = _parts(b)
        acc = tl.dot(a, low, acc)
        acc = tl.dot(a, middle, acc)
        acc = tl.dot(a, high, acc)
    elif PRECISION != "ieee" and a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, middle, low = _parts(a)
        acc = tl.dot(low, b, acc)
        acc = tl.dot(middle, b, acc)
        acc = tl.dot(high, b, acc)
    else:
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _parts(x):
    """Three bfloat16 numbers whose sum is a float32 one, the largest first."""
    high = _leading(x)
    rest = x - high
    middle = _leading(rest)
    low = rest - middle
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def _leading(x):
    """The leading 8 bits of float32 numbers: cut, not rounded, which would overflow some."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
