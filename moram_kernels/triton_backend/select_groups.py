"""Selection into lists by groups of 32 atoms, for banks of many times top_k atoms.

The top_k largest scores of a row lie in the top_k groups with the largest maxima: any other group
has top_k groups before it, each with a score that is larger, or equal and at a lower index. So one
number in 32 is searched, then 32 top_k scores. Exact, ties included: groups and the atoms in them
stay in index order, and of equal ones the first win twice.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from . import available
from .cost import GROUP
from .launcher import Launch, Steps, cdiv, launch, next_power_of_2, numbers_of
from .threshold import select_rows
from .weights import candidates, clamped_norm, shares, softmax_scale, written_scores

# Groups whose maxima are taken at a time, where the scores' kernel did not leave them.
GROUPS_AT_ONCE = 64


@triton.jit
def group_maxima(scores, is_atom, GROUP: tl.constexpr):
    """(largest score, sum of squares) of each group [rows, columns / GROUP].

    Columns that are no atoms hold a score of their group, or of a group that is none. A maximum is
    NaN only where all scores are.
    """
    rows: tl.constexpr = scores.shape[0]
    groups: tl.constexpr = scores.shape[1] // GROUP
    maxima = tl.max(tl.reshape(scores, [rows, groups, GROUP]), 2)
    squares = tl.where(is_atom, scores * scores, 0.0)
    return maxima, tl.sum(tl.reshape(squares, [rows, groups, GROUP]), 2)


@triton.jit
def _group_kernel(
    scores_ptr,  # [M, N] float32
    maxima_ptr,  # [M, groups] float32
    squares_ptr,  # [M, groups] float32
    index_ptr,  # [M, TOP_K] int32
    written_ptr,  # [M, TOP_K] float32
    picked_ptr,  # [M, TOP_K] float32
    current_ptr,  # scores of the current atoms [M, N - num_frozen] float32
    stats_ptr,  # [4, M] float32
    N,
    num_frozen,
    stride_sm,
    stride_gm,
    inv_temperature,
    threshold,
    eps,
    TOP_K: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    SAVE_CURRENT: tl.constexpr,
    SAVE_STATS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOG_G: tl.constexpr,
    LOG_C: tl.constexpr,
):
    """Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(N, GROUP)
    row = scores_ptr + m * stride_sm
    group = tl.arange(0, BLOCK_G)[None, :]
    is_group = group < groups
    offs = m * stride_gm + group
    if HAS_MAXIMA:
        squares = tl.sum(tl.load(squares_ptr + offs, mask=is_group, other=0.0), 1)
    else:
        squares = tl.zeros((BLOCK_N // GROUP, GROUP), tl.float32)
        offs_n = tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        for start in range(0, N, BLOCK_N):
            is_atom = start + offs_n < N
            scores = tl.load(row + start + offs_n, mask=is_atom, other=float("nan"))
            squares += tl.where(is_atom, scores * scores, 0.0)
            some = start // GROUP + tl.arange(0, BLOCK_N // GROUP)
            tl.store(maxima_ptr + m * stride_gm + some, tl.max(scores, 1), mask=some < groups)
        squares = tl.sum(squares, 1, keep_dims=True)
        squares = tl.sum(squares, 0)
        # What other warps wrote is read below.
        tl.debug_barrier()
    norm = tl.sqrt(squares)
    maxima = tl.load(maxima_ptr + offs, mask=is_group, other=float("-inf"))
    maxima = tl.where(maxima == maxima, maxima, float("-inf"))
    top = tl.max(maxima, 1)
    low = tl.min(tl.where(is_group, maxima, float("inf")), 1)
    maxima, value = select_rows(maxima, low, top, TOP_K, LOG_G)
    selected = maxima >= value[:, None]
    place = m * TOP_K + tl.cumsum(selected.to(tl.int32), 1) - 1
    # The groups' numbers lie for a moment where the atoms' are wanted.
    tl.store(index_ptr + place, tl.zeros_like(selected.to(tl.int32)) + group, mask=selected)
    tl.debug_barrier()
    offs_c = tl.arange(0, BLOCK_C)
    slot = offs_c // GROUP
    found = tl.load(index_ptr + m * TOP_K + slot, mask=slot < TOP_K, other=0)
    column = found * GROUP + offs_c % GROUP
    is_atom = ((slot < TOP_K) & (column < N))[None, :]
    column = column[None, :]
    scores = tl.load(row + column, mask=is_atom, other=0.0)
    tl.debug_barrier()
    x = candidates(scores, is_atom, False)
    low = tl.min(tl.where(is_atom, x, float("inf")), 1)
    x, value = select_rows(x, low, top, TOP_K, LOG_C)
    selected = x >= value[:, None]
    clamped = clamped_norm(norm, eps)
    share = shares(x, value, top, softmax_scale(inv_temperature, clamped))
    inverse_sum = 1.0 / tl.sum(share, 1)
    written = written_scores(x, share, value, inverse_sum, norm, clamped, threshold, HAS_THRESHOLD)
    place = m * TOP_K + tl.cumsum(selected.to(tl.int32), 1) - 1
    tl.store(index_ptr + place, column, mask=selected)
    tl.store(written_ptr + place, written, mask=selected)
    tl.store(picked_ptr + place, x, mask=selected)
    if SAVE_STATS:
        tl.store(stats_ptr + m + tl.arange(0, 1), norm)
    if SAVE_CURRENT:
        num_current = N - num_frozen
        for start in range(0, num_current, BLOCK_C):
            inside = start + offs_c < num_current
            own = tl.load(row + num_frozen + start + offs_c, mask=inside, other=0.0)
            tl.store(current_ptr + m * num_current + start + offs_c, own, mask=inside)


def launch_select_groups(
    scores: Tensor,
    rule: Rule,
    lists: tuple[Tensor, Tensor, Tensor],
    current: tuple[Tensor, int] | None = None,
    stats: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    steps: Steps | None = None,
) -> None:
    """Select from scores [M, N] of at least `GROUP` (top_k - 1) + top_k atoms into lists.

    Args:
        groups: what `new_groups` made and the scores' kernel filled, or None.
        The rest as for `select.launch_select`; of stats only the norm is filled.
    """
    num_rows, num_atoms = scores.shape
    maxima, squares = groups or new_groups(scores)
    kept, num_frozen = current or (scores, 0)

    def describe() -> Launch:
        block_g = next_power_of_2(cdiv(num_atoms, GROUP))
        block_c = next_power_of_2(GROUP * rule.top_k)
        # 16 maxima or scores a lane: their places take registers as well.
        warps = max(1, min(8, max(block_g, block_c) // 512))
        constants = {
            "TOP_K": rule.top_k,
            "HAS_MAXIMA": groups is not None,
            "HAS_THRESHOLD": rule.threshold > 0,
            "SAVE_CURRENT": current is not None,
            "SAVE_STATS": stats is not None,
            "GROUP": GROUP,
            "BLOCK_N": GROUP * GROUPS_AT_ONCE,
            "BLOCK_G": block_g,
            "BLOCK_C": block_c,
            "LOG_G": block_g.bit_length() - 1,
            "LOG_C": block_c.bit_length() - 1,
            "num_warps": warps,
            **available.unbound(True),
        }
        strides = (scores.stride(0), maxima.stride(0))
        numbers = (num_atoms, num_frozen, *strides, *numbers_of(rule))
        return Launch(_group_kernel, (num_rows,), numbers, constants)

    about = scores if stats is None else stats
    launch((scores, maxima, squares, *lists, kept, about), describe, steps)


def new_groups(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (maxima, squares), float32 [M, groups], for scores [M, N]."""
    rows, count = scores.shape[0], cdiv(scores.shape[1], GROUP)
    # Rows of a multiple of 8 numbers are stored in whole sectors.
    maxima, squares = scores.new_empty(2, rows, cdiv(count, 8) * 8)
    return maxima[:, :count], squares[:, :count]
