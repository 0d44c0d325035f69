"""Device functions of self-activation on register tiles, shared by the forward kernels.

Names and stages are the reference's. A row whose norm is not finite (an inf or NaN came in, or the
squares overflow float32) writes NaN, and only into its own output.

Factors that were computed in float32 meet 16-bit rows in a product as bfloat16, or as float16 times
a power of two a row (`half_scale`), because float16 would overflow or lose small ones.
"""

import triton
import triton.language as tl


@triton.jit
def candidates(scores, is_atom, ALL: tl.constexpr):
    """Scores to select from: NaN counts as -inf, columns that are no atoms are never selected."""
    x = tl.where(scores == scores, scores, float("-inf"))
    if ALL:
        return tl.where(is_atom, x, float("nan"))
    return tl.where(is_atom, x, float("-inf"))


@triton.jit
def clamped_norm(norm, eps):
    """max(norm, eps)."""
    return tl.maximum(norm, eps)


@triton.jit
def softmax_scale(inv_temperature, clamped):
    """1 / (temperature x norm), kept finite, so that equal scores stay equal: 0 x inf is NaN."""
    return tl.minimum(inv_temperature / clamped, 3.0e38)


@triton.jit
def shares(x, value, top, scale):
    """exp((score - top) scale) where selected, else 0: the weights before they are normalised."""
    return tl.where(x >= value[:, None], tl.exp((x - top[:, None]) * scale[:, None]), 0.0)


@triton.jit
def written_scores(
    x, share, value, inverse_sum, norm, clamped, threshold, HAS_THRESHOLD: tl.constexpr
):
    """weight x score of every atom: 0 outside the selection, NaN throughout a row with no norm."""
    # 0 * norm is 0 for finite norms and NaN otherwise.
    outside = norm * 0.0
    cut = value
    if HAS_THRESHOLD:
        cut = tl.maximum(value, threshold * clamped)
    inside = share * x * (inverse_sum + outside)[:, None]
    return tl.where(x >= cut[:, None], inside, outside[:, None])


@triton.jit
def half_scale(largest):
    """(scale, 1 / scale): powers of two; scale takes numbers of up to largest into float16.

    The largest comes to [2^14, 2^15) of 65504; what is 2^28 times smaller keeps its 11 bits.
    """
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_stats(stats_ptr, offs, stride, mask, norm, top, inverse_sum, value):
    """Per token, for the backward: one row each of stats [4, M], so that loads are contiguous."""
    stats = stats_ptr + offs
    tl.store(stats, norm, mask=mask)
    stats += stride
    tl.store(stats, top, mask=mask)
    stats += stride
    tl.store(stats, inverse_sum, mask=mask)
    stats += stride
    tl.store(stats, value, mask=mask)
