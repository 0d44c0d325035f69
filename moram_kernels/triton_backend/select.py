"""From scores to weighted scores in one launch, for rows of up to 8192 atoms.

Fused: the norm, the exact top_k, the temperature softmax, the threshold and weight x score. The
result is dense (for a product with all values) or lists of the selected atoms in index order (for a
gather). Larger banks: `select_groups.py`. Equations: `moram_kernels/reference.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from . import available
from .launcher import Launch, Steps, cdiv, launch, next_power_of_2, numbers_of
from .threshold import select_rows
from .weights import (
    candidates,
    clamped_norm,
    half_scale,
    shares,
    softmax_scale,
    store_stats,
    written_scores,
)


@triton.jit
def _select_kernel(
    scores_ptr,  # [M, N] float32
    written_ptr,  # dense [M, N] or lists [M, TOP_K]
    unscale_ptr,  # [M] float32, by which dense float16 has to be multiplied
    index_ptr,  # lists [M, TOP_K] int32
    picked_ptr,  # scores of the lists [M, TOP_K] float32
    current_ptr,  # scores of the current atoms [M, N - num_frozen] float32
    stats_ptr,  # [4, M] float32
    M,
    N,
    num_frozen,
    stride_sm,
    stride_wm,
    stride_stats,
    inv_temperature,
    threshold,
    eps,
    TOP_K: tl.constexpr,
    ALL: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    LISTS: tl.constexpr,
    SAVE_CURRENT: tl.constexpr,
    SAVE_STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_N: tl.constexpr,
):
    """Grid (row tiles,); a program holds whole rows."""
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - pid * BLOCK_M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    row = (first + offs_m)[:, None]
    offs = row * stride_sm + offs_n[None, :]
    scores = tl.load(scores_ptr + offs, mask=mask, other=0.0)
    norm = tl.sqrt(tl.sum(scores * scores, 1))
    clamped = clamped_norm(norm, eps)
    x = candidates(scores, mask_n[None, :], ALL)
    if BLOCK_M > 1 and not ALL:
        # Rows past the end would be nothing but ties, and ties take the slow way.
        apart = (BLOCK_N - offs_n).to(tl.float32)[None, :]
        x = tl.where(mask_m[:, None], x, apart)
    if ALL:
        top = tl.max(tl.where(mask_n[None, :], x, float("-inf")), 1)
        value = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    else:
        top = tl.max(x, 1)
        low = tl.min(tl.where(mask_n[None, :], x, float("inf")), 1)
        x, value = select_rows(x, low, top, TOP_K, LOG_N)
    share = shares(x, value, top, softmax_scale(inv_temperature, clamped))
    inverse_sum = 1.0 / tl.sum(share, 1)
    per_share = inverse_sum
    if written_ptr.dtype.element_ty == tl.float16:
        # No weighted score is larger than the norm.
        scale_half, unscale = half_scale(norm)
        per_share *= scale_half
        tl.store(unscale_ptr + first + offs_m, unscale, mask=mask_m)
    written = written_scores(x, share, value, per_share, norm, clamped, threshold, HAS_THRESHOLD)
    if LISTS:
        # Places in this program's lists fit in 32 bits, and 64 would take registers.
        selected = x >= value[:, None]
        place = tl.cumsum(selected.to(tl.int32), 1) - 1
        kept = selected & mask_m[:, None]
        offs_list = offs_m[:, None] * TOP_K + place
        base = first * TOP_K
        index = tl.zeros_like(place) + offs_n[None, :]
        tl.store(index_ptr + base + offs_list, index, mask=kept)
        tl.store(written_ptr + base + offs_list, written, mask=kept)
        tl.store(picked_ptr + base + offs_list, scores, mask=kept)
    else:
        offs_written = row * stride_wm + offs_n[None, :]
        cast = written.to(written_ptr.dtype.element_ty)
        tl.store(written_ptr + offs_written, cast, mask=mask)
    if SAVE_CURRENT:
        num_current = N - num_frozen
        column = offs_n - num_frozen
        offs_current = offs_m[:, None] * num_current + column[None, :]
        tl.store(
            current_ptr + first * num_current + offs_current,
            scores,
            mask=mask & (column >= 0)[None, :],
        )
    if SAVE_STATS:
        store_stats(stats_ptr + first, offs_m, stride_stats, mask_m, norm, top, inverse_sum, value)


def tiles(num_atoms: int, lists: bool) -> tuple[dict[str, int], int]:
    """Rows and warps of a program that holds rows of that many atoms in registers.

    Args:
        num_atoms: columns of the scores. lists: whether places in lists are found as well.
    """
    block = max(16, next_power_of_2(num_atoms))
    if block <= 128:
        # Many short rows, and the places in their lists, take registers: 4 elements a lane.
        return {"BLOCK_M": 512 // block, "BLOCK_N": block}, 4
    if lists and 512 <= block <= 1024 and available.is_early():
        # 16 elements a lane, because 32 spill on sm_80 before Triton 3.8.
        return {"BLOCK_M": 1, "BLOCK_N": block}, block // 512
    # 32 elements a lane.
    return {"BLOCK_M": max(1, 1024 // block), "BLOCK_N": block}, max(1, block // 1024)


def launch_select(
    scores: Tensor,
    rule: Rule,
    *,
    written: Tensor | None = None,
    unscale: Tensor | None = None,
    lists: tuple[Tensor, Tensor, Tensor] | None = None,
    current: tuple[Tensor, int] | None = None,
    stats: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """Select from scores [M, N], N <= 8192, into preallocated outputs.

    Args:
        scores: float32, unit column stride.
        rule: `Rule`; threshold 0 where it does not apply.
        written: dense output [M, N], in the dtype of the product that follows, or None.
        unscale: [M] float32 for a float16 written, which is to be multiplied by it; or None.
        lists: (index int32, written float32, scores float32), each [M, min(top_k, N)], or None.
        current: (scores of current atoms [M, C] float32, num_frozen) or None.
        stats: [4, M] float32 or None.
    """
    index, written, picked = lists or (scores, written, scores)
    assert written is not None, "either written or lists"
    kept, num_frozen = current or (scores, 0)

    def describe() -> Launch:
        num_rows, num_atoms = scores.shape
        blocks, warps = tiles(num_atoms, lists is not None)
        numbers = (
            num_rows,
            num_atoms,
            num_frozen,
            scores.stride(0),
            written.stride(0),
            0 if stats is None else stats.stride(0),
            *numbers_of(rule),
        )
        constants = {
            "TOP_K": min(rule.top_k, num_atoms),
            "ALL": rule.top_k >= num_atoms,
            "HAS_THRESHOLD": rule.threshold > 0,
            "LISTS": lists is not None,
            "SAVE_CURRENT": current is not None,
            "SAVE_STATS": stats is not None,
            "LOG_N": blocks["BLOCK_N"].bit_length() - 1,
            "num_warps": warps,
            **available.unbound(blocks["BLOCK_N"] == 256),
            **blocks,
        }
        return Launch(_select_kernel, (cdiv(num_rows, blocks["BLOCK_M"]),), numbers, constants)

    unscale = scores if unscale is None else unscale
    about = scores if stats is None else stats
    launch((scores, written, unscale, index, picked, kept, about), describe, steps)
