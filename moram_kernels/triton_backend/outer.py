"""Sums of outer products over rows: gradients of the current atoms, and keys^T keys.

Both gradients are one launch: dkeys = dscores^T x and dvalues = written^T dy over all tokens. With
splits, partial sums over blocks of tokens are added in fixed order by a second launch: no atomics,
the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Tile
from .launcher import Launch, Steps, cdiv, dot_dtype, launch, rows
from .products import multiply
from .segments import Table, row_pointers
from .weights import half_scale


@triton.jit
def _sum_outer(
    a_ptr,
    b_ptr,
    start,
    stop,
    M,
    num_a,
    num_b,
    stride_am,
    stride_bm,
    offs_a,
    offs_b,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """sum over rows m of a[m, offs_a]^T b[m, offs_b]; columns past the end are zeros."""
    offs_m = tl.arange(0, BLOCK_M)
    # Masks, not repeated columns, keep whole vectors in the loads.
    mask_a = (offs_a < num_a)[:, None]
    mask_b = (offs_b < num_b)[None, :]
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for m in range(start, stop, BLOCK_M):
        row = m + offs_m
        mask = row < stop
        # Rows past the end: zeros of a meet copies of the last row of b.
        row = tl.minimum(row, M - 1).to(tl.int64)
        a_tile = a_ptr + row[None, :] * stride_am + offs_a[:, None]
        a = tl.load(a_tile, mask=mask[None, :] & mask_a, other=0.0)
        b_tile = b_ptr + row[:, None] * stride_bm + offs_b[None, :]
        b = tl.load(b_tile, mask=mask_b, other=0.0)
        if tl.float16 == DOT:
            a = a.to(tl.float32)
            scale_half, unscale = half_scale(tl.max(tl.abs(a), 1))
            a = (a * scale_half[:, None]).to(DOT)
            acc += tl.dot(a, b.to(DOT), input_precision=PRECISION) * unscale[:, None]
        else:
            acc = multiply(a, b, acc, DOT, PRECISION)
    return acc


@triton.jit
def _bank_gradient_kernel(
    dscores_ptr,  # [M, C]
    x_ptr,  # [M, D]
    written_ptr,  # [M, C]
    grad_ptr,  # dy [M, O]
    out_ptr,  # [splits, C * D + C * O]: dkeys, then dvalues
    M,
    C,
    D,
    num_out,
    key_tiles,
    split_rows,
    stride_dm,
    stride_xm,
    stride_wm,
    stride_gm,
    DOT: tl.constexpr,
    DOT_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid (tiles of C, tiles of D then tiles of O, splits of M)."""
    offs_c = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, M)
    base = out_ptr + split.to(tl.int64) * C * (D + num_out)
    mask_c = (offs_c < C)[:, None]
    if tile < key_tiles:
        offs_d = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        acc = _sum_outer(
            dscores_ptr,
            x_ptr,
            start,
            stop,
            M,
            C,
            D,
            stride_dm,
            stride_xm,
            offs_c,
            offs_d,
            DOT,
            PRECISION,
            BLOCK_M,
            BLOCK_A,
            BLOCK_B,
        )
        offs = offs_c.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = mask_c & (offs_d < D)[None, :]
        tl.store(base + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        offs_o = (tile - key_tiles) * BLOCK_B + tl.arange(0, BLOCK_B)
        acc = _sum_outer(
            written_ptr,
            grad_ptr,
            start,
            stop,
            M,
            C,
            num_out,
            stride_wm,
            stride_gm,
            offs_c,
            offs_o,
            DOT_VALUES,
            PRECISION,
            BLOCK_M,
            BLOCK_A,
            BLOCK_B,
        )
        offs = offs_c.to(tl.int64)[:, None] * num_out + offs_o[None, :]
        mask = mask_c & (offs_o < num_out)[None, :]
        base += tl.cast(C, tl.int64) * D
        tl.store(base + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(
    partial_ptr,  # [SPLITS, size] float32
    out_ptr,  # [size]
    size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tiles of size,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < tl.minimum(size - first, BLOCK).to(tl.int32)
    acc = tl.zeros((BLOCK,), tl.float32)
    stride = tl.cast(size, tl.int64)
    for split in range(SPLITS):
        acc += tl.load(partial_ptr + split * stride + first + offs, mask=mask, other=0.0)
    tl.store(out_ptr + first + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gram_kernel(
    frozen_ptr,  # [num_frozen, D]
    current_ptr,  # [N - num_frozen, D]
    out_ptr,  # [D, D]
    N,
    D,
    num_frozen,
    stride_frozen,
    stride_current,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """out = keys^T keys; grid (tiles of D, tiles of D)."""
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    mask_a = (offs_a < D)[:, None]
    mask_b = (offs_b < D)[None, :]
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for n in range(0, N, BLOCK_N):
        atom = n + offs_n
        mask = atom < N
        rows_ = row_pointers(
            tl.minimum(atom, N - 1),
            frozen_ptr,
            current_ptr,
            num_frozen,
            stride_frozen,
            stride_current,
            ALIGNED,
        )
        a = tl.load(rows_[None, :] + offs_a[:, None], mask=mask[None, :] & mask_a, other=0.0)
        b = tl.load(rows_[:, None] + offs_b[None, :], mask=mask_b, other=0.0)
        acc = multiply(a, b, acc, DOT, PRECISION)
    offs = offs_a.to(tl.int64)[:, None] * D + offs_b[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask_a & mask_b)


def launch_bank_gradient(
    dscores: Tensor,
    x: Tensor,
    written: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    precision: str,
    config: Tile,
    splits: int,
    steps: Steps | None = None,
) -> tuple[Tensor, Tensor]:
    """(dkeys [C, D], dvalues [C, O]) in a dtype, in one launch or, with splits > 1, in two.

    Args:
        dscores, written: [M, C], gradients of the scores and weighted scores of current atoms, as
            `launcher.summed` says.
        x: [M, D]; grad: dy [M, O]; all with unit column stride.
        config: {"BLOCK_M", "BLOCK_A", "BLOCK_B", "num_warps", "num_stages"}.
    """
    x, grad = rows(x), rows(grad)
    num_rows, count = dscores.shape
    width, out = x.shape[1], grad.shape[1]
    size = count * (width + out)
    splits = max(1, min(splits, cdiv(num_rows, config["BLOCK_M"])))
    split_rows = cdiv(cdiv(num_rows, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = cdiv(num_rows, split_rows)
    result = partial = x.new_empty(size, dtype=dtype)
    if splits > 1:
        partial = x.new_empty(splits, size, dtype=torch.float32)

    def describe() -> Launch:
        key_tiles = cdiv(width, config["BLOCK_B"])
        grid = (
            cdiv(count, config["BLOCK_A"]),
            key_tiles + cdiv(out, config["BLOCK_B"]),
            splits,
        )
        numbers = (
            num_rows,
            count,
            width,
            out,
            key_tiles,
            split_rows,
            dscores.stride(0),
            x.stride(0),
            written.stride(0),
            grad.stride(0),
        )
        constants = {
            "DOT": _dot_dtype(dscores, x, dtype),
            "DOT_VALUES": _dot_dtype(written, grad, dtype),
            "PRECISION": precision,
            **config,
        }
        return Launch(_bank_gradient_kernel, grid, numbers, constants)

    def describe_sum() -> Launch:
        constants = {"SPLITS": splits, "BLOCK": 1024, "num_warps": 4}
        return Launch(_sum_splits_kernel, (cdiv(size, 1024),), (size,), constants)

    launch((dscores, x, written, grad, partial), describe, steps)
    if splits > 1:
        launch((partial, result), describe_sum, steps)
    dkeys = result.as_strided((count, width), (width, 1))
    return dkeys, result.as_strided((count, out), (out, 1), count * width)


def _dot_dtype(factors: Tensor, rows_: Tensor, dtype: torch.dtype) -> tl.dtype:
    """`dot_dtype`, but float16 wherever rows and result have it: factors are scaled to it."""
    half = rows_.dtype == dtype == torch.float16
    return tl.float16 if half else dot_dtype(factors, rows_)


def launch_gram(
    keys: Table, out: Tensor, precision: str, config: Tile, steps: Steps | None = None
) -> None:
    """out [D, D] = keys^T keys over all rows of a table.

    Args:
        config: {"BLOCK_N", "BLOCK_A", "BLOCK_B", "num_warps", "num_stages"}.
    """

    def describe() -> Launch:
        grid = cdiv(keys.width, config["BLOCK_A"]), cdiv(keys.width, config["BLOCK_B"])
        numbers = (keys.num_rows, keys.width, keys.num_frozen, *keys.strides)
        constants = {
            "DOT": dot_dtype(keys),
            "PRECISION": precision,
            "ALIGNED": keys.aligned,
            **config,
        }
        return Launch(_gram_kernel, grid, numbers, constants)

    launch((*keys.pieces, out), describe, steps)
