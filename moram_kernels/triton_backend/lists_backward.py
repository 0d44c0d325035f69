"""Backward of self-activation from the saved lists of selected atoms, for large banks.

The pull is computed for the selected atoms alone, by gathering their values. What every atom gets
through the norm is one factor a token, which the gather of dx applies to x (keys^T keys). For the
current atoms, which need a gradient of their own, both parts are written as dense columns.
Equations: `rows_backward.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from . import available
from .launcher import Launch, Steps, launch, next_power_of_2, numbers_of
from .rows_backward import score_gradient
from .segments import Table, row_pointers
from .weights import clamped_norm, softmax_scale


@triton.jit
def _lists_backward_kernel(
    index_ptr,  # [M, TOP_K] int32
    picked_ptr,  # scores of the selected atoms [M, TOP_K] float32
    stats_ptr,  # norm [M] float32
    current_ptr,  # scores of the current atoms [M, C] float32
    grad_ptr,  # dy [M, O]
    frozen_ptr,  # values [num_frozen, O]
    current_values_ptr,  # [C, O]
    dlist_ptr,  # [M, TOP_K] float32
    factor_ptr,  # [M] float32
    dscores_ptr,  # of the current atoms [M, C]
    written_ptr,  # of the current atoms [M, C]
    width,
    num_frozen,
    num_current,
    stride_gm,
    stride_frozen,
    stride_current,
    inv_temperature,
    threshold,
    eps,
    TOP_K: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_CURRENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    atom = tl.load(index_ptr + m * TOP_K + offs_k, mask=mask_k, other=0)
    scores = tl.load(picked_ptr + m * TOP_K + offs_k, mask=mask_k, other=0.0)[None, :]
    norm = tl.load(stats_ptr + m + tl.arange(0, 1))
    clamped = clamped_norm(norm, eps)
    scale = softmax_scale(inv_temperature, clamped)
    rows = row_pointers(
        atom, frozen_ptr, current_values_ptr, num_frozen, stride_frozen, stride_current, ALIGNED
    )
    offs_o = tl.arange(0, BLOCK_O)
    pulls = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    for o in range(0, width, BLOCK_O):
        column = o + offs_o
        mask_o = column < width
        dy = tl.load(grad_ptr + m * stride_gm + column, mask=mask_o, other=0.0).to(tl.float32)
        read = mask_k[:, None] & mask_o[None, :]
        v = tl.load(rows[:, None] + column[None, :], mask=read, other=0.0).to(tl.float32)
        pulls += dy[None, :] * v
    pull = tl.sum(pulls, 1)[None, :]
    top = tl.max(tl.where(mask_k[None, :], scores, float("-inf")), 1)
    share = tl.where(mask_k[None, :], tl.exp((scores - top[:, None]) * scale[:, None]), 0.0)
    weights = share * (1.0 / tl.sum(share, 1) + norm * 0.0)[:, None]
    fires = scores >= (threshold * clamped)[:, None]
    dlist, factor, written = score_gradient(
        scores, weights, fires, pull, norm, clamped, scale, eps, HAS_THRESHOLD
    )
    offs = m * TOP_K + offs_k[None, :]
    tl.store(dlist_ptr + offs, dlist, mask=mask_k[None, :])
    tl.store(factor_ptr + m + tl.arange(0, 1), factor)
    if HAS_CURRENT:
        offs_c = tl.arange(0, BLOCK_C)
        for c in range(0, num_current, BLOCK_C):
            column = c + offs_c
            mask_c = column < num_current
            hit = (atom - num_frozen)[:, None] == column[None, :]
            hit = hit & mask_k[:, None]
            own = tl.sum(tl.where(hit, tl.trans(dlist), 0.0), 0)
            wrote = tl.sum(tl.where(hit, tl.trans(written), 0.0), 0)
            place = m * num_current + column
            score = tl.load(current_ptr + place, mask=mask_c, other=0.0)
            own -= tl.sum(factor, 0) * score
            tl.store(dscores_ptr + place, own.to(dscores_ptr.dtype.element_ty), mask=mask_c)
            tl.store(written_ptr + place, wrote.to(written_ptr.dtype.element_ty), mask=mask_c)


def launch_lists_backward(
    grad: Tensor,
    lists: tuple[Tensor, Tensor],
    norm: Tensor,
    current_scores: Tensor,
    values: Table,
    dlist: Tensor,
    factor: Tensor,
    dscores: Tensor,
    written: Tensor,
    rule: Rule,
    steps: Steps | None = None,
) -> None:
    """Fill dlist [M, K], factor [M] and, for the current atoms, dscores and written [M, C].

    Args:
        grad: dy [M, O], unit column stride.
        lists: (index, scores of the selected atoms) as saved; norm: [M] or stats [4, M].
        current_scores: [M, C] float32, contiguous like dscores and written.
        values: a `Table`.
        rule: `Rule` of the forward; threshold 0 where it did not apply.
    """
    index, picked = lists
    num_current = values.num_rows - values.num_frozen
    none = num_current == 0

    def describe() -> Launch:
        num_rows, top_k = index.shape
        numbers = (
            values.width,
            values.num_frozen,
            num_current,
            grad.stride(0),
            *values.strides,
            *numbers_of(rule),
        )
        constants = {
            "TOP_K": top_k,
            "HAS_THRESHOLD": rule.threshold > 0,
            "HAS_CURRENT": not none,
            "ALIGNED": values.aligned,
            "num_warps": 4,
            **available.unbound(top_k > 64),
            **config(top_k, num_current, values.width),
        }
        return Launch(_lists_backward_kernel, (num_rows,), numbers, constants)

    scores, *own = (picked, dlist, dlist) if none else (current_scores, dscores, written)
    tensors = (index, picked, norm, scores, grad, *values.pieces, dlist, factor, *own)
    launch(tensors, describe, steps)


def config(top_k: int, num_current: int, width: int) -> dict[str, int]:
    """Tile sizes: the values' tile is the largest, 2048 elements."""
    block_k = next_power_of_2(top_k)
    return {
        "BLOCK_K": block_k,
        "BLOCK_C": max(1, min(32, next_power_of_2(max(1, num_current)))),
        "BLOCK_O": max(16, min(2048 // block_k, next_power_of_2(width))),
    }
