"""Selection for rows of more than 8192 atoms: the top_k of every chunk, then of all chunks.

Two launches, lists out, the same numbers as `select.py`: chunks and the candidates in them stay in
index order, so that of equal scores the lowest index wins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from .cost import CHUNK
from .launcher import Launch, Steps, cdiv, launch, next_power_of_2, numbers_of
from .threshold import select_rows
from .weights import candidates, clamped_norm, shares, softmax_scale, written_scores


@triton.jit
def _chunk_kernel(
    scores_ptr,  # [M, N] float32
    score_ptr,  # candidates' scores [M, chunks, TOP_K] float32, NaN where a chunk has fewer atoms
    index_ptr,  # candidates' columns [M, chunks, TOP_K] int32
    squares_ptr,  # [M, chunks] float32
    current_ptr,  # scores of the current atoms [M, N - num_frozen] float32
    N,
    num_frozen,
    stride_sm,
    TOP_K: tl.constexpr,
    SAVE_CURRENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_N: tl.constexpr,
):
    """Grid (M, chunks)."""
    m = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    offs_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[None, :]
    scores = tl.load(scores_ptr + m * stride_sm + offs_n[None, :], mask=mask_n, other=0.0)
    slot = m * chunks + chunk
    tl.store(squares_ptr + slot + tl.arange(0, 1), tl.sum(scores * scores, 1))
    present = tl.minimum(N - chunk * BLOCK_N, BLOCK_N)
    x = candidates(scores, mask_n, False)
    top = tl.max(x, 1)
    low = tl.min(tl.where(mask_n, x, float("inf")), 1)
    x, value = select_rows(x, low, top, TOP_K, LOG_N)
    selected = tl.where(present <= TOP_K, mask_n, x >= value[:, None])
    place = tl.cumsum(selected.to(tl.int32), 1) - 1
    kept = tl.where(scores == scores, scores, float("-inf"))
    tl.store(score_ptr + slot * TOP_K + place, kept, mask=selected)
    index = tl.zeros_like(place) + offs_n[None, :]
    tl.store(index_ptr + slot * TOP_K + place, index, mask=selected)
    offs_k = tl.arange(0, BLOCK_K)
    empty = (offs_k >= present) & (offs_k < TOP_K)
    nan = tl.full((BLOCK_K,), float("nan"), tl.float32)
    tl.store(score_ptr + slot * TOP_K + offs_k, nan, mask=empty)
    if SAVE_CURRENT:
        column = (offs_n - num_frozen)[None, :]
        num_current = N - num_frozen
        tl.store(current_ptr + m * num_current + column, scores, mask=mask_n & (column >= 0))


@triton.jit
def _combine_kernel(
    score_ptr,  # [M, CANDIDATES] float32
    candidate_ptr,  # [M, CANDIDATES] int32
    squares_ptr,  # [M, CHUNKS] float32
    index_ptr,  # [M, TOP_K] int32
    written_ptr,  # [M, TOP_K] float32
    picked_ptr,  # [M, TOP_K] float32
    stats_ptr,  # [4, M] float32
    inv_temperature,
    threshold,
    eps,
    CHUNKS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    SAVE_STATS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_N: tl.constexpr,
):
    """Grid (M,)."""
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = (offs_n < CHUNKS * TOP_K)[None, :]
    offs = m * CHUNKS * TOP_K + offs_n[None, :]
    found = tl.load(score_ptr + offs, mask=mask_n, other=float("nan"))
    column = tl.load(candidate_ptr + offs, mask=mask_n & (found == found), other=0)
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    squares = tl.load(squares_ptr + m * CHUNKS + offs_c, mask=offs_c < CHUNKS, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 1))
    clamped = clamped_norm(norm, eps)
    # Empty slots are NaN and never selected; at least TOP_K others exist.
    top = tl.max(tl.where(found == found, found, float("-inf")), 1)
    low = tl.min(tl.where(found == found, found, float("inf")), 1)
    x = tl.where(found == found, found, float("-inf"))
    x, value = select_rows(x, low, top, TOP_K, LOG_N)
    x = tl.where(found == found, x, float("nan"))
    share = shares(x, value, top, softmax_scale(inv_temperature, clamped))
    inverse_sum = 1.0 / tl.sum(share, 1)
    written = written_scores(x, share, value, inverse_sum, norm, clamped, threshold, HAS_THRESHOLD)
    selected = x >= value[:, None]
    place = tl.cumsum(selected.to(tl.int32), 1) - 1
    tl.store(index_ptr + m * TOP_K + place, column, mask=selected)
    tl.store(written_ptr + m * TOP_K + place, written, mask=selected)
    tl.store(picked_ptr + m * TOP_K + place, x, mask=selected)
    if SAVE_STATS:
        tl.store(stats_ptr + m + tl.arange(0, 1), norm)


def launch_select_wide(
    scores: Tensor,
    rule: Rule,
    lists: tuple[Tensor, Tensor, Tensor],
    current: tuple[Tensor, int] | None = None,
    stats: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """Select from scores [M, N] of any N >= top_k into lists, in two launches.

    Args: as for `select.launch_select`; of stats only the norm is filled.
    """
    num_rows, num_atoms = scores.shape
    top_k, chunks = rule.top_k, cdiv(num_atoms, CHUNK)
    found = scores.new_empty(num_rows, chunks, top_k)
    column = scores.new_empty(num_rows, chunks, top_k, dtype=torch.int32)
    squares = scores.new_empty(num_rows, chunks)
    kept, num_frozen = current or (scores, 0)

    def describe_chunks() -> Launch:
        constants = {
            "TOP_K": top_k,
            "SAVE_CURRENT": current is not None,
            "BLOCK_K": next_power_of_2(top_k),
            "BLOCK_N": CHUNK,
            "LOG_N": CHUNK.bit_length() - 1,
            "num_warps": 4,
        }
        numbers = (num_atoms, num_frozen, scores.stride(0))
        return Launch(_chunk_kernel, (num_rows, chunks), numbers, constants)

    def describe_all() -> Launch:
        block = next_power_of_2(chunks * top_k)
        constants = {
            "CHUNKS": chunks,
            "TOP_K": top_k,
            "HAS_THRESHOLD": rule.threshold > 0,
            "SAVE_STATS": stats is not None,
            "BLOCK_C": next_power_of_2(chunks),
            "BLOCK_N": block,
            "LOG_N": block.bit_length() - 1,
            "num_warps": max(1, min(8, block // 512)),
        }
        numbers = numbers_of(rule)
        return Launch(_combine_kernel, (num_rows,), numbers, constants)

    launch((scores, found, column, squares, kept), describe_chunks, steps)
    about = scores if stats is None else stats
    launch((found, column, squares, *lists, about), describe_all, steps)
