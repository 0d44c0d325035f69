"""Scores of one input against up to three banks in one launch: q, k and v, or gate and up.

The same products in the same order as `scores.py`, hence the same bits; one launch instead of two
or three, and neighbouring programs read the same rows of x while L2 still holds them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Tile
from .launcher import Launch, Steps, cdiv, dot_dtype, launch, rows
from .products import multiply
from .segments import Table, row_pointers

MAX_TABLES = 3


@triton.jit
def _shared_score_kernel(
    x_ptr,  # [M, D]
    out_ptr,  # [M, columns] float32, each table's scores side by side
    frozen_ptr,
    current_ptr,
    frozen2_ptr,
    current2_ptr,
    frozen3_ptr,
    current3_ptr,
    M,
    D,
    N,
    N2,
    N3,
    num_frozen,
    num_frozen2,
    num_frozen3,
    stride_frozen,
    stride_current,
    stride_frozen2,
    stride_current2,
    stride_frozen3,
    stride_current3,
    column2,
    column3,
    tiles,
    tiles2,
    stride_xm,
    stride_om,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row tiles, atom tiles of the first, second and third table)."""
    tile = tl.program_id(1)
    column = 0
    if tile >= tiles2:
        tile -= tiles2
        frozen_ptr, current_ptr, N, num_frozen = frozen3_ptr, current3_ptr, N3, num_frozen3
        stride_frozen, stride_current, column = stride_frozen3, stride_current3, column3
    elif tile >= tiles:
        tile -= tiles
        frozen_ptr, current_ptr, N, num_frozen = frozen2_ptr, current2_ptr, N2, num_frozen2
        stride_frozen, stride_current, column = stride_frozen2, stride_current2, column2
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row = tl.minimum(offs_m, M - 1).to(tl.int64)
    x_rows = (x_ptr + row * stride_xm)[:, None] + offs_d[None, :]
    atoms = row_pointers(
        tl.minimum(offs_n, N - 1),
        frozen_ptr,
        current_ptr,
        num_frozen,
        stride_frozen,
        stride_current,
        ALIGNED,
    )
    atoms = atoms[None, :] + offs_d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(x_rows + d)
            b = tl.load(atoms + d)
        else:
            mask_d = d + offs_d < D
            a = tl.load(x_rows + d, mask=mask_d[None, :], other=0.0)
            b = tl.load(atoms + d, mask=mask_d[:, None], other=0.0)
        acc = multiply(a, b, acc, DOT, PRECISION)
    offs = offs_m.to(tl.int64)[:, None] * stride_om + (column + offs_n)[None, :]
    tl.store(out_ptr + offs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def launch_shared_scores(
    x: Tensor,
    tables: Sequence[Table],
    precision: str,
    config: Tile,
    steps: Steps | None = None,
) -> list[Tensor]:
    """Scores float32 [M, N_i] of x [M, D] for two or three tables, views of one tensor.

    Args:
        tables: keys as `Table`s of equal width and dtype.
        config: as for `scores.launch_scores`.
    """
    x = rows(x)
    num_rows, width = x.shape
    counts = [table.num_rows for table in tables]
    # Every table's columns start at a multiple of 16 numbers.
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + -(-count // 16) * 16)
    out = x.new_empty(num_rows, starts[-1], dtype=torch.float32)
    filled = (*tables, tables[-1])[:MAX_TABLES]

    def describe() -> Launch:
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + cdiv(count, config["BLOCK_N"]))
        numbers = (
            num_rows,
            width,
            *(table.num_rows for table in filled),
            *(table.num_frozen for table in filled),
            *(stride for table in filled for stride in table.strides),
            starts[1],
            starts[2] if len(tables) > 2 else 0,
            ends[1],
            ends[2] if len(tables) > 2 else ends[-1],
            x.stride(0),
            out.stride(0),
        )
        constants = {
            "DOT": dot_dtype(x, tables[0]),
            "PRECISION": precision,
            "ALIGNED": all(table.aligned for table in tables),
            "EVEN_D": width % config["BLOCK_D"] == 0,
            **config,
        }
        grid = cdiv(num_rows, config["BLOCK_M"]), ends[-1]
        return Launch(_shared_score_kernel, grid, numbers, constants)

    launch((x, out, *(piece for table in filled for piece in table.pieces)), describe, steps)
    return [out[:, start : start + count] for start, count in zip(starts, counts, strict=False)]
