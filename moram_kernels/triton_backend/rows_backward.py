"""Backward of self-activation for whole rows: from scores and the pull of every atom to dscores.

With g_i = <values_i, dy> (the pull), z the normalised scores and dz their gradient through the
softmax: ds = w g + dz / n on the selected atoms and ds -= s <z, dz> / n^2 on every atom, where n =
max(||s||, eps) and the last term is absent where the clamp is active. The weights are recomputed
from the saved scores; the selection from the saved border value and the forward's rule for ties.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from .launcher import Launch, Steps, cdiv, launch, next_power_of_2, numbers_of
from .threshold import drop_ties
from .weights import candidates, clamped_norm, half_scale, shares, softmax_scale


@triton.jit
def score_gradient(
    scores, weights, fires, pull, norm, clamped, scale, eps, HAS_THRESHOLD: tl.constexpr
):
    """(gradient through the selected atoms, factor of the scores of every atom, w s that wrote).

    The factor [rows] is to be subtracted: ds = first - factor x scores.
    """
    written = weights * scores
    if HAS_THRESHOLD:
        pull = tl.where(fires, pull, 0.0)
        written = tl.where(fires, written, 0.0)
    share = written * pull
    dnorm_scores = (share - weights * tl.sum(share, 1)[:, None]) * scale[:, None]
    factor = tl.sum(dnorm_scores * scores, 1) / clamped / clamped
    factor = tl.where(norm < eps, 0.0, factor)
    return weights * pull + dnorm_scores, factor, written


@triton.jit
def _rows_backward_kernel(
    scores_ptr,  # [M, N] float32
    pull_ptr,  # [M, N] float32
    stats_ptr,  # [4, M] float32
    dscores_ptr,  # [M, N]
    unscale_ptr,  # [M] float32, by which float16 dscores have to be multiplied
    own_ptr,  # dscores of the current atoms where they are scaled [M, N - num_frozen] float32
    written_ptr,  # of the current atoms [M, N - num_frozen]
    M,
    N,
    num_frozen,
    stride_sm,
    stride_pm,
    stride_dm,
    stride_wm,
    stride_stats,
    inv_temperature,
    threshold,
    eps,
    TOP_K: tl.constexpr,
    ALL: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_N: tl.constexpr,
):
    """Grid (row tiles,)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = (offs_n < N)[None, :]
    mask = mask_m[:, None] & mask_n
    offs = offs_m[:, None] * stride_sm + offs_n[None, :]
    scores = tl.load(scores_ptr + offs, mask=mask, other=0.0)
    offs = offs_m[:, None] * stride_pm + offs_n[None, :]
    pull = tl.load(pull_ptr + offs, mask=mask, other=0.0)
    stats = stats_ptr + offs_m
    norm = tl.load(stats, mask=mask_m, other=1.0)
    stats += stride_stats
    top = tl.load(stats, mask=mask_m, other=0.0)
    stats += stride_stats
    inverse_sum = tl.load(stats, mask=mask_m, other=0.0)
    stats += stride_stats
    value = tl.load(stats, mask=mask_m, other=float("inf"))
    clamped = clamped_norm(norm, eps)
    scale = softmax_scale(inv_temperature, clamped)
    x = candidates(scores, mask_n, ALL)
    if not ALL:
        x = drop_ties(x, value, TOP_K, LOG_N)
    # 0 * norm carries a norm that is not finite into the whole row.
    weights = shares(x, value, top, scale) * (inverse_sum + norm * 0.0)[:, None]
    fires = x >= (threshold * clamped)[:, None]
    dscores, factor, written = score_gradient(
        scores, weights, fires, pull, norm, clamped, scale, eps, HAS_THRESHOLD
    )
    dscores -= scores * factor[:, None]
    column = (offs_n - num_frozen)[None, :]
    offs_current = offs_m[:, None] * stride_wm + column
    is_current = mask & (column >= 0)
    if dscores_ptr.dtype.element_ty == tl.float16:
        # Sums over tokens, which have a scale each, take them as they are.
        tl.store(own_ptr + offs_current, dscores, mask=is_current)
        scale_half, unscale = half_scale(tl.max(tl.abs(dscores), 1))
        dscores *= scale_half[:, None]
        tl.store(unscale_ptr + offs_m, unscale, mask=mask_m)
    offs = offs_m[:, None] * stride_dm + offs_n[None, :]
    cast = dscores.to(dscores_ptr.dtype.element_ty)
    tl.store(dscores_ptr + offs, cast, mask=mask)
    cast = written.to(written_ptr.dtype.element_ty)
    tl.store(written_ptr + offs_current, cast, mask=is_current)


def tiles(num_atoms: int) -> tuple[dict[str, int], int]:
    """Rows and warps of a program: half as many elements a lane as the forward, for two tiles."""
    block = max(16, next_power_of_2(num_atoms))
    warps = 4 if block <= 128 else max(1, min(16, block // 512))
    return {"BLOCK_M": max(1, 512 // block), "BLOCK_N": block}, warps


def launch_rows_backward(
    scores: Tensor,
    pull: Tensor,
    stats: Tensor,
    dscores: Tensor,
    written: Tensor,
    num_frozen: int,
    rule: Rule,
    own: Tensor | None = None,
    unscale: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """Fill dscores [M, N] and the weighted scores of the current atoms, written [M, C].

    Float16 dscores are filled with a power of two a row, over which unscale [M] takes them, both
    float32, and own [M, C] with those of the current atoms as they are.

    Args:
        scores, stats: as the forward saved them; scores may have spare columns.
        pull: float32 [M, N], N <= 8192.
        rule: `Rule` of the forward; threshold 0 where it did not apply.
    """

    def describe() -> Launch:
        num_rows, num_atoms = pull.shape
        blocks, warps = tiles(num_atoms)
        numbers = (
            num_rows,
            num_atoms,
            num_frozen,
            scores.stride(0),
            pull.stride(0),
            dscores.stride(0),
            written.stride(0),
            stats.stride(0),
            *numbers_of(rule),
        )
        constants = {
            "TOP_K": min(rule.top_k, num_atoms),
            "ALL": rule.top_k >= num_atoms,
            "HAS_THRESHOLD": rule.threshold > 0,
            "LOG_N": blocks["BLOCK_N"].bit_length() - 1,
            "num_warps": warps,
            **blocks,
        }
        grid = (cdiv(num_rows, blocks["BLOCK_M"]),)
        return Launch(_rows_backward_kernel, grid, numbers, constants)

    # What has no elements gives way to what has.
    unscale = stats if unscale is None else unscale
    own = own if own is not None and own.shape[1] else stats
    wrote = written if written.shape[1] else dscores
    launch((scores, pull, stats, dscores, unscale, own, wrote), describe, steps)
