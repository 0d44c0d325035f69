"""The whole forward in one launch, for banks whose scores of a row tile fit in registers.

Fused: scores, norm, top_k (by a network of `networks.py`), softmax, threshold, values, residual.
The atoms lie in one tile of 16 to 128 columns or in two (96 = 64 + 32, 160 = 128 + 32, 192 = 128 +
64), padded at the end. For the backward the scores and four numbers a token are stored; weights are
recomputed from them. Equations: `moram_kernels/reference.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from ..aliases import Rule, Tile
from . import launcher
from .launcher import Launch, Steps, cdiv, dot_dtype, launch, numbers_of, rows
from .networks import network
from .products import multiply
from .segments import Table, row_pointers
from .threshold import count_from, drop_ties, tied_column
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
def _drop_ties_of_two(x, x2, value, TOP_K: tl.constexpr, LOG_N: tl.constexpr, LOG_N2: tl.constexpr):
    """`drop_ties` for a row in two tiles: the first tile's copies are kept first."""
    if tl.max(count_from(x, value) + count_from(x2, value), 0) > TOP_K:
        above = tl.sum((x > value[:, None]).to(tl.int32), 1)
        above += tl.sum((x2 > value[:, None]).to(tl.int32), 1)
        equal = tl.sum((x == value[:, None]).to(tl.int32), 1)
        first = tl.minimum(TOP_K - above, equal)
        second = TOP_K - above - first
        last = tied_column(x, value, tl.maximum(first, 1), LOG_N)
        last = tl.where(first > 0, last, -1)
        last2 = tied_column(x2, value, tl.maximum(second, 1), LOG_N2)
        last2 = tl.where(second > 0, last2, -1)
        columns = tl.arange(0, x.shape[1])[None, :]
        columns2 = tl.arange(0, x2.shape[1])[None, :]
        nan = float("nan")
        x = tl.where((x == value[:, None]) & (columns > last[:, None]), nan, x)
        x2 = tl.where((x2 == value[:, None]) & (columns2 > last2[:, None]), nan, x2)
    return x, x2


@triton.jit
def _resident_kernel(
    x_ptr,  # [M, D]
    keys_ptr,  # [num_frozen, D]
    current_keys_ptr,  # [N - num_frozen, D]
    values_ptr,  # [num_frozen, O]
    current_values_ptr,  # [N - num_frozen, O]
    residual_ptr,  # [M, O]
    out_ptr,  # [M, O]
    scores_ptr,  # [M, N] float32
    stats_ptr,  # [4, M] float32
    M,
    N,
    D,
    num_out,
    num_frozen,
    stride_xm,
    stride_keys,
    stride_current_keys,
    stride_values,
    stride_current_values,
    stride_rm,
    stride_om,
    stride_sm,
    stride_stats,
    inv_temperature,
    threshold,
    eps,
    TOP_K: tl.constexpr,
    ALL: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SAVE: tl.constexpr,
    NETWORK: tl.constexpr,
    DOT: tl.constexpr,
    DOT_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_N2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Grid (row tiles,). D % BLOCK_D == 0 and O % BLOCK_O == 0: no mask inside the loops.

    Rows of x and of the bank past the end repeat the last one; what they give is masked after.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    row = tl.minimum(offs_m, M - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    x_rows = x_ptr + row[:, None] * stride_xm + offs_d[None, :]
    keys = row_pointers(
        tl.minimum(offs_n, N - 1),
        keys_ptr,
        current_keys_ptr,
        num_frozen,
        stride_keys,
        stride_current_keys,
        ALIGNED,
    )
    keys = keys[None, :] + offs_d[:, None]
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_N2 > 0:
        offs_n2 = BLOCK_N + tl.arange(0, BLOCK_N2)
        keys2 = row_pointers(
            tl.minimum(offs_n2, N - 1),
            keys_ptr,
            current_keys_ptr,
            num_frozen,
            stride_keys,
            stride_current_keys,
            ALIGNED,
        )
        keys2 = keys2[None, :] + offs_d[:, None]
        scores2 = tl.zeros((BLOCK_M, BLOCK_N2), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(x_rows + d)
        scores = multiply(x, tl.load(keys + d), scores, DOT, PRECISION)
        if BLOCK_N2 > 0:
            scores2 = multiply(x, tl.load(keys2 + d), scores2, DOT, PRECISION)
    mask_n = offs_n < N
    if SAVE:
        # Right after the product, before the selection needs the registers.
        saved = scores_ptr + offs_m.to(tl.int64)[:, None] * stride_sm
        tl.store(saved + offs_n[None, :], scores, mask=mask_m[:, None] & mask_n[None, :])
        if BLOCK_N2 > 0:
            mask_n2 = offs_n2 < N
            tl.store(saved + offs_n2[None, :], scores2, mask=mask_m[:, None] & mask_n2[None, :])

    # Rows past the end count as atoms of score 0 nowhere: not in the norm, not in the selection.
    squares = tl.sum(tl.where(mask_n[None, :], scores * scores, 0.0), 1)
    z = candidates(scores, mask_n[None, :], ALL)
    if BLOCK_N2 > 0:
        is_atom2 = (offs_n2 < N)[None, :]
        squares += tl.sum(tl.where(is_atom2, scores2 * scores2, 0.0), 1)
        z2 = candidates(scores2, is_atom2, ALL)
    norm = tl.sqrt(squares)
    clamped = clamped_norm(norm, eps)
    if ALL:
        top = tl.max(tl.where(mask_n[None, :], z, float("-inf")), 1)
        if BLOCK_N2 > 0:
            top = tl.maximum(top, tl.max(tl.where(is_atom2, z2, float("-inf")), 1))
        value = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    elif BLOCK_N2 > 0:
        value, top = NETWORK(z, z2, BLOCK_M)
        z, z2 = _drop_ties_of_two(z, z2, value, TOP_K, LOG_N, LOG_N2)
    else:
        value, top = NETWORK(z, BLOCK_M)
        z = drop_ties(z, value, TOP_K, LOG_N)
    scale = softmax_scale(inv_temperature, clamped)
    share = shares(z, value, top, scale)
    total = tl.sum(share, 1)
    if BLOCK_N2 > 0:
        share2 = shares(z2, value, top, scale)
        total += tl.sum(share2, 1)
    inverse_sum = 1.0 / total
    if SAVE:
        store_stats(stats_ptr, offs_m, stride_stats, mask_m, norm, top, inverse_sum, value)
    if tl.float16 == DOT_VALUES:
        # No weighted score is larger than the norm.
        scale_half, unscale = half_scale(norm)
        inverse_sum *= scale_half
    written = written_scores(
        z, share, value, inverse_sum, norm, clamped, threshold, HAS_THRESHOLD
    ).to(DOT_VALUES)
    values = row_pointers(
        tl.minimum(offs_n, N - 1),
        values_ptr,
        current_values_ptr,
        num_frozen,
        stride_values,
        stride_current_values,
        ALIGNED,
    )
    offs_o = tl.arange(0, BLOCK_O)
    values = values[:, None] + offs_o[None, :]
    if BLOCK_N2 > 0:
        written2 = written_scores(
            z2, share2, value, inverse_sum, norm, clamped, threshold, HAS_THRESHOLD
        ).to(DOT_VALUES)
        values2 = row_pointers(
            tl.minimum(offs_n2, N - 1),
            values_ptr,
            current_values_ptr,
            num_frozen,
            stride_values,
            stride_current_values,
            ALIGNED,
        )
        values2 = values2[:, None] + offs_o[None, :]
    wide_m = offs_m.to(tl.int64)[:, None]
    residual_rows = residual_ptr + wide_m * stride_rm
    out_rows = out_ptr + wide_m * stride_om
    for o in range(0, num_out, BLOCK_O):
        update = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        update = multiply(written, tl.load(values + o), update, DOT_VALUES, PRECISION_VALUES)
        if BLOCK_N2 > 0:
            v2 = tl.load(values2 + o)
            update = multiply(written2, v2, update, DOT_VALUES, PRECISION_VALUES)
        if tl.float16 == DOT_VALUES:
            update *= unscale[:, None]
        column = (o + offs_o)[None, :]
        if HAS_RESIDUAL:
            residual = tl.load(residual_rows + column, mask=mask_m[:, None], other=0.0)
            update += residual.to(tl.float32)
        tl.store(out_rows + column, update.to(out_ptr.dtype.element_ty), mask=mask_m[:, None])


def launch_resident(
    x: Tensor,
    keys: Table,
    values: Table,
    residual: Tensor | None,
    out: Tensor,
    rule: Rule,
    precision: str,
    config: Tile,
    save: tuple[Tensor, Tensor] | None,
    steps: Steps | None = None,
) -> None:
    """out [M, O] = residual + update of the rows of x, in one launch.

    Args:
        x: [M, D], unit column stride; keys, values: `Table`s of N <= 192 atoms.
        residual: [M, O] or None; may be out.
        rule: `Rule`; threshold 0 where it does not apply.
        config: {"BLOCK_M", "BLOCK_N", "BLOCK_N2", "BLOCK_D", "BLOCK_O", "num_warps", "num_stages"}.
        save: (scores float32 [M, >= N], stats float32 [4, M]) to fill, or None.
    """
    x = rows(x)
    given = out if residual is None else residual
    scores, stats = save or (out, out)

    def describe() -> Launch:
        num_rows, width = x.shape
        num_atoms = keys.num_rows
        every = rule.top_k >= num_atoms
        tile, tile2 = config["BLOCK_N"], config["BLOCK_N2"]
        numbers = (
            num_rows,
            num_atoms,
            width,
            values.width,
            keys.num_frozen,
            x.stride(0),
            *keys.strides,
            *values.strides,
            given.stride(0),
            out.stride(0),
            scores.stride(0),
            stats.stride(0),
            *numbers_of(rule),
        )
        constants = {
            "TOP_K": min(rule.top_k, num_atoms),
            "ALL": every,
            "HAS_THRESHOLD": rule.threshold > 0,
            "HAS_RESIDUAL": residual is not None,
            "SAVE": save is not None,
            "NETWORK": None if every else network_for(tile, tile2, rule.top_k, x.device),
            "DOT": dot_dtype(x, keys),
            "DOT_VALUES": dot_dtype(x, values, out),
            "PRECISION": precision,
            "PRECISION_VALUES": launcher.precision_of_sum(precision, out),
            "ALIGNED": keys.aligned and values.aligned,
            "LOG_N": tile.bit_length() - 1,
            "LOG_N2": max(0, tile2.bit_length() - 1),
            **config,
        }
        grid = (cdiv(num_rows, config["BLOCK_M"]),)
        return Launch(_resident_kernel, grid, numbers, constants)

    tensors = (x, *keys.pieces, *values.pieces, given, out, scores, stats)
    launch(tensors, describe, steps)


def network_for(tile: int, tile2: int, top_k: int, device: torch.device) -> KernelInterface[Any]:
    """The network of a row in one tile or two.

    Args:
        tile, tile2: columns of the first tile and of the second one, 0 = there is none.
        top_k: atoms per token, 4, 8 or 16. device: a torch device.
    """
    return network((tile, tile2) if tile2 else (tile,), top_k, launcher.target(device))
