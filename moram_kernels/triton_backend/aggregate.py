"""Sums of a table's rows onto the residual: dense coefficients (a product) or lists (a gather).

Used for the values in the forward and for the keys in the backward (dx). The residual is read and
the output written once, each in its own dtype; they may be the same tensor.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Tile
from .launcher import Launch, Steps, cdiv, dot_dtype, launch, next_power_of_2, precision_of_sum
from .products import multiply
from .segments import Table, row_pointers


@triton.jit
def _aggregate_kernel(
    coefficients_ptr,  # [M, N]
    unscale_ptr,  # [M] float32, factors of float16 coefficients
    frozen_ptr,  # [num_frozen, O]
    current_ptr,  # [N - num_frozen, O]
    residual_ptr,  # [M, O]
    out_ptr,  # [M, O]
    M,
    N,
    width,
    num_frozen,
    stride_cm,
    stride_frozen,
    stride_current,
    stride_rm,
    stride_om,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_UNSCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out = residual + coefficients table; grid (row tiles, feature tiles)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    row = tl.minimum(offs_m, M - 1).to(tl.int64)
    # Features past the end repeat the last one; they are not stored.
    column = offs_o if EVEN_O else tl.minimum(offs_o, width - 1)
    coefficient_rows = (coefficients_ptr + row * stride_cm)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for n in range(0, N, BLOCK_N):
        atom = n + offs_n
        # Coefficients past the end are zeros, the rows they meet copies of the last one.
        c = tl.load(coefficient_rows + atom[None, :], mask=(atom < N)[None, :], other=0.0)
        atom = tl.minimum(atom, N - 1)
        table = row_pointers(
            atom, frozen_ptr, current_ptr, num_frozen, stride_frozen, stride_current, ALIGNED
        )
        v = tl.load(table[:, None] + column[None, :])
        acc = multiply(c, v, acc, DOT, PRECISION)
    if HAS_UNSCALE:
        acc *= tl.load(unscale_ptr + row)[:, None]
    mask = mask_m[:, None]
    if not EVEN_O:
        mask = mask & (offs_o < width)[None, :]
    if HAS_RESIDUAL:
        offs = (row * stride_rm)[:, None] + offs_o[None, :]
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    offs = (row * stride_om)[:, None] + offs_o[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(
    index_ptr,  # [M, TOP_K] int32
    coefficients_ptr,  # [M, TOP_K] float32
    frozen_ptr,  # [num_frozen, O]
    current_ptr,  # [N - num_frozen, O]
    residual_ptr,  # [M, O]
    extra_ptr,  # [M, O]
    factor_ptr,  # [M] float32
    out_ptr,  # [M, O]
    width,
    num_frozen,
    stride_frozen,
    stride_current,
    stride_rm,
    stride_em,
    stride_om,
    TOP_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out = residual + sum over a list of coefficient x row - factor x extra; grid (M, tiles)."""
    m = tl.program_id(0).to(tl.int64)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask_o = offs_o < width
    mask_k = offs_k < TOP_K
    atom = tl.load(index_ptr + m * TOP_K + offs_k, mask=mask_k, other=0)
    c = tl.load(coefficients_ptr + m * TOP_K + offs_k, mask=mask_k, other=0.0)
    table = row_pointers(
        atom, frozen_ptr, current_ptr, num_frozen, stride_frozen, stride_current, ALIGNED
    )
    # Silenced atoms are not read.
    read = (c != 0.0)[:, None] & mask_o[None, :]
    v = tl.load(table[:, None] + offs_o[None, :], mask=read, other=0.0)
    acc = tl.sum(c[:, None] * v.to(tl.float32), 0)
    if HAS_EXTRA:
        extra = tl.load(extra_ptr + m * stride_em + offs_o, mask=mask_o, other=0.0)
        acc -= tl.load(factor_ptr + m) * extra.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m * stride_rm + offs_o, mask=mask_o, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + m * stride_om + offs_o, acc.to(out_ptr.dtype.element_ty), mask=mask_o)


def launch_aggregate(
    coefficients: Tensor,
    table: Table,
    residual: Tensor | None,
    out: Tensor,
    precision: str,
    config: Tile,
    unscale: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """out [M, O] = residual + coefficients [M, N] times a table of rows [N, O].

    Args:
        coefficients: unit column stride. residual: [M, O], unit column stride, or None.
        unscale: [M] float32 by which the coefficients' rows are multiplied, or None.
        config: {"BLOCK_M", "BLOCK_N", "BLOCK_O", "num_warps", "num_stages"}.
    """
    given = out if residual is None else residual

    def describe() -> Launch:
        num_rows, num_atoms = coefficients.shape
        grid = cdiv(num_rows, config["BLOCK_M"]), cdiv(table.width, config["BLOCK_O"])
        numbers = (
            num_rows,
            num_atoms,
            table.width,
            table.num_frozen,
            coefficients.stride(0),
            *table.strides,
            given.stride(0),
            out.stride(0),
        )
        constants = {
            "DOT": dot_dtype(coefficients, table),
            "PRECISION": precision_of_sum(precision, out),
            "ALIGNED": table.aligned,
            "HAS_UNSCALE": unscale is not None,
            "HAS_RESIDUAL": residual is not None,
            "EVEN_O": table.width % config["BLOCK_O"] == 0,
            **config,
        }
        return Launch(_aggregate_kernel, grid, numbers, constants)

    factors = coefficients if unscale is None else unscale
    launch((coefficients, factors, *table.pieces, given, out), describe, steps)


def launch_gather(
    index: Tensor,
    coefficients: Tensor,
    table: Table,
    residual: Tensor | None,
    out: Tensor,
    extra: Tensor | None = None,
    factor: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """out [M, O] = residual + sum_k coefficients[m, k] table[index[m, k]] - factor[m] extra[m].

    Args:
        index: int32 [M, K]; coefficients: float32 [M, K], both contiguous.
        extra, factor: [M, O] and float32 [M], both or neither.
    """
    given = out if residual is None else residual
    more = out if extra is None else extra

    def describe() -> Launch:
        num_rows, top_k = index.shape
        blocks, warps = gather_tiles(top_k, table.width)
        numbers = (
            table.width,
            table.num_frozen,
            *table.strides,
            given.stride(0),
            more.stride(0),
            out.stride(0),
        )
        constants = {
            "TOP_K": top_k,
            "HAS_RESIDUAL": residual is not None,
            "HAS_EXTRA": extra is not None,
            "ALIGNED": table.aligned,
            "num_warps": warps,
            **blocks,
        }
        grid = num_rows, cdiv(table.width, blocks["BLOCK_O"])
        return Launch(_gather_kernel, grid, numbers, constants)

    factors = coefficients if factor is None else factor
    launch((index, coefficients, *table.pieces, given, more, factors, out), describe, steps)


def gather_tiles(top_k: int, width: int) -> tuple[dict[str, int], int]:
    """Tile and warps of the gather: at most 32 elements a lane of rows that were read."""
    block_k = next_power_of_2(top_k)
    block_o = min(512, max(16, 4096 // block_k), next_power_of_2(width))
    return {"BLOCK_K": block_k, "BLOCK_O": block_o}, 4 if block_k * block_o >= 4096 else 1
