"""Device functions that find the top_k largest of each row of a register tile, exactly.

A row's scores are split by a value: atoms at or above it are selected. `x` [rows, columns] is
float32 without NaN, except in columns that must never be selected: there it is -inf (if at least
top_k others exist) or NaN, because NaN >= value is false whatever the value. Where equal scores
straddle the border, `drop_ties` keeps the lowest columns and turns the surplus into NaN.
"""

import triton
import triton.language as tl


@triton.jit
def count_from(x, value):
    """How many elements of each row are at or above its value."""
    return tl.sum((x >= value[:, None]).to(tl.int32), 1)


@triton.jit
def bisect_threshold(x, low, high, TOP_K: tl.constexpr, ROUNDS: tl.constexpr):
    """A value with exactly TOP_K elements at or above it, or, where ROUNDS do not find one, more.

    low, high: a row's smallest and largest score. Ends when every row has its value.
    """
    value = low
    done = low >= high
    round_ = 0
    pending = 1
    while pending > 0:
        middle = low + 0.5 * (high - low)
        count = count_from(x, middle)
        enough = count >= TOP_K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        value = tl.where(done, value, low)
        done = done | (count == TOP_K)
        round_ += 1
        pending = tl.max((done == 0).to(tl.int32), 0)
        pending = tl.where(round_ < ROUNDS, pending, 0)
    return value


@triton.jit
def radix_threshold(x, TOP_K: tl.constexpr):
    """The TOP_K-th largest value of each row, ties counted, by its bits: 32 rounds, exact."""
    bits = _ordered_bits(x + 0.0)
    count = tl.sum((bits >= 0).to(tl.int32), 1)
    found = tl.where(count >= TOP_K, 0, -2147483648).to(tl.int32)
    bit = 1 << 30
    for _ in range(31):
        candidate = found | bit
        count = tl.sum((bits >= candidate[:, None]).to(tl.int32), 1)
        found = tl.where(count >= TOP_K, candidate, found)
        bit = bit >> 1
    return _from_ordered_bits(found)


@triton.jit
def drop_ties(x, value, TOP_K: tl.constexpr, LOG_N: tl.constexpr):
    """x with the surplus copies of a row's TOP_K-th largest value, the last ones, made NaN."""
    if tl.max(count_from(x, value), 0) > TOP_K:
        columns = tl.arange(0, x.shape[1])[None, :]
        needed = TOP_K - tl.sum((x > value[:, None]).to(tl.int32), 1)
        last = tied_column(x, value, needed, LOG_N)
        surplus = (x == value[:, None]) & (columns > last[:, None])
        x = tl.where(surplus, float("nan"), x)
    return x


@triton.jit
def tied_column(x, value, needed, LOG_N: tl.constexpr):
    """Column of the needed-th (>= 1) element that equals the row's value."""
    columns = tl.arange(0, x.shape[1])[None, :]
    last = tl.zeros_like(needed)
    bit = 1 << (LOG_N - 1)
    for _ in range(LOG_N):
        candidate = last + bit
        before = (x == value[:, None]) & (columns < candidate[:, None])
        last = tl.where(tl.sum(before.to(tl.int32), 1) < needed, candidate, last)
        bit = bit >> 1
    return last


@triton.jit
def select_rows(x, low, high, TOP_K: tl.constexpr, LOG_N: tl.constexpr):
    """(x with surplus ties made NaN, value): the selected atoms of a row are where x >= value."""
    value = bisect_threshold(x, low, high, TOP_K, 24)
    if tl.max(count_from(x, value), 0) > TOP_K:
        value = radix_threshold(x, TOP_K)
        x = drop_ties(x, value, TOP_K, LOG_N)
    return x, value


@triton.jit
def _ordered_bits(x):
    """int32 in the order of float32; -0.0 must have been made 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered_bits(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
