"""Scores of tokens against a table of rows: out = a rows^T in float32, one launch, both segments.

Used for x keys^T (scores) and for dy values^T (the pull on every atom). With `splits` the sum over
the features is left in as many partial sums, to be added in fixed order by the reader. With
`groups` the largest score and the sum of squares of every 32 atoms are written too.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Tile
from .cost import GROUP
from .launcher import Launch, Steps, cdiv, dot_dtype, launch, rows
from .products import multiply
from .segments import Table, row_pointers
from .select_groups import group_maxima


@triton.jit
def _score_kernel(
    a_ptr,  # [M, D]
    frozen_ptr,  # [num_frozen, D]
    current_ptr,  # [N - num_frozen, D]
    out_ptr,  # [splits, M, N] float32
    maxima_ptr,  # [M, groups] float32
    squares_ptr,  # [M, groups] float32
    M,
    N,
    D,
    num_frozen,
    stride_am,
    stride_frozen,
    stride_current,
    stride_os,
    stride_om,
    stride_gm,
    split_width,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row tiles, atom tiles, splits of D). Rows past the end repeat the last one."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    row = tl.minimum(offs_m, M - 1).to(tl.int64)
    a_rows = (a_ptr + row * stride_am)[:, None] + offs_d[None, :]
    atom = tl.minimum(offs_n, N - 1)
    atoms = row_pointers(
        atom, frozen_ptr, current_ptr, num_frozen, stride_frozen, stride_current, ALIGNED
    )
    atoms = atoms[None, :] + offs_d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = split * split_width
    stop = tl.minimum(start + split_width, D)
    for d in range(start, stop, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_rows + d)
            b = tl.load(atoms + d)
        else:
            mask_d = d + offs_d < stop
            a = tl.load(a_rows + d, mask=mask_d[None, :], other=0.0)
            b = tl.load(atoms + d, mask=mask_d[:, None], other=0.0)
        acc = multiply(a, b, acc, DOT, PRECISION)
    base = out_ptr + split.to(tl.int64) * stride_os
    offs = offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
    tl.store(base + offs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
    if HAS_GROUPS:
        maxima, squares = group_maxima(acc, (offs_n < N)[None, :], GROUP)
        groups = tl.cdiv(N, GROUP)
        group = tl.program_id(1) * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
        offs = offs_m.to(tl.int64)[:, None] * stride_gm + group[None, :]
        mask = (offs_m < M)[:, None] & (group < groups)[None, :]
        tl.store(maxima_ptr + offs, maxima, mask=mask)
        tl.store(squares_ptr + offs, squares, mask=mask)


def launch_scores(
    a: Tensor,
    table: Table,
    out: Tensor,
    precision: str,
    config: Tile,
    splits: int = 1,
    steps: Steps | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write a [M, D] times the rows of a table, transposed, to out [M, N] or [splits, M, N].

    Args:
        a: unit column stride. out: float32, unit column stride.
        precision: of float32 products, "ieee" or "bf16x6".
        config: {"BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"}.
        groups: (maxima, squares) of `select_groups.new_groups` to fill, or None.
    """
    a = rows(a)

    def describe() -> Launch:
        num_rows, width = a.shape
        block_d = config["BLOCK_D"]
        grid = (
            cdiv(num_rows, config["BLOCK_M"]),
            cdiv(table.num_rows, config["BLOCK_N"]),
            splits,
        )
        numbers = (
            num_rows,
            table.num_rows,
            width,
            table.num_frozen,
            a.stride(0),
            *table.strides,
            out.stride(0) if out.dim() == 3 else 0,
            out.stride(-2),
            groups[0].stride(0) if groups else 0,
            cdiv(cdiv(width, splits), block_d) * block_d,
        )
        constants = {
            "DOT": dot_dtype(a, table),
            "PRECISION": precision,
            "ALIGNED": table.aligned,
            "EVEN_D": width % block_d == 0,
            "HAS_GROUPS": groups is not None,
            "GROUP": GROUP,
            **config,
        }
        return Launch(_score_kernel, grid, numbers, constants)

    launch((a, *table.pieces, out, *(groups or (out, out))), describe, steps)
