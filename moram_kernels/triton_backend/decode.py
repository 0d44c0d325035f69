"""The second of two launches for a few tokens: select and gather, a program per token and tile.

The first launch (`scores.py`) leaves partial sums over splits of D, because one token's keys must
be read by many programs at once; they are added here in fixed order. Then top_k rounds of arg-max,
each followed by one row of the values: the first maximum is the softmax's, nothing is rescaled.
Inference only. Equations: `moram_kernels/reference.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..aliases import Rule
from .launcher import Launch, Steps, cdiv, launch, next_power_of_2, numbers_of
from .segments import Table, row_pointers
from .weights import clamped_norm, softmax_scale


@triton.jit
def _decode_kernel(
    partial_ptr,  # [splits, M, N] float32
    frozen_ptr,  # [num_frozen, O]
    current_ptr,  # [N - num_frozen, O]
    residual_ptr,  # [M, O]
    out_ptr,  # [M, O]
    M,
    N,
    width,
    num_frozen,
    stride_frozen,
    stride_current,
    stride_rm,
    stride_om,
    inv_temperature,
    threshold,
    eps,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Grid (M, feature tiles)."""
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_n = offs_n < N
    mask_o = offs_o < width
    scores = tl.zeros((BLOCK_N,), tl.float32)
    plane = tl.cast(M, tl.int64) * N
    for split in range(SPLITS):
        part = partial_ptr + split * plane + m * N
        scores += tl.load(part + offs_n, mask=mask_n, other=0.0)
    norm = tl.sqrt(tl.sum(scores * scores, 0))
    clamped = clamped_norm(norm, eps)
    scale = softmax_scale(inv_temperature, clamped)
    x = tl.where(scores == scores, scores, float("-inf"))
    x = tl.where(mask_n, x, float("nan"))
    top = tl.max(tl.where(mask_n, x, float("-inf")), 0)
    acc = tl.zeros((BLOCK_O,), tl.float32)
    total = 0.0
    for _ in range(TOP_K):
        # NaN marks what cannot be taken again; comparisons with it are false.
        best = tl.max(tl.where(x == x, x, float("-inf")), 0)
        atom = tl.min(tl.where(x == best, offs_n, BLOCK_N), 0)
        x = tl.where(offs_n == atom, float("nan"), x)
        share = tl.exp((best - top) * scale)
        total += share
        fires = atom < N
        if HAS_THRESHOLD:
            fires = fires & (best >= threshold * clamped)
        row = row_pointers(
            tl.minimum(atom, N - 1),
            frozen_ptr,
            current_ptr,
            num_frozen,
            stride_frozen,
            stride_current,
            False,
        )
        v = tl.load(row + offs_o, mask=mask_o & fires, other=0.0).to(tl.float32)
        acc += tl.where(fires, share * best, 0.0) * v
    # 0 * norm turns the whole row into NaN where the norm is not finite.
    acc = acc / total + norm * 0.0
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m * stride_rm + offs_o, mask=mask_o, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + m * stride_om + offs_o, acc.to(out_ptr.dtype.element_ty), mask=mask_o)


def launch_decode(
    partial: Tensor,
    values: Table,
    residual: Tensor | None,
    out: Tensor,
    rule: Rule,
    steps: Steps | None = None,
) -> None:
    """out [M, O] = residual + update, from partial scores [splits, M, N], N <= 8192.

    Args:
        partial: float32, contiguous. values: a `Table`. residual: [M, O] or None; may be out.
        rule: `Rule`.
    """
    given = out if residual is None else residual

    def describe() -> Launch:
        splits, num_rows, num_atoms = partial.shape
        block, block_o = config(num_atoms, values.width)
        numbers = (
            num_rows,
            num_atoms,
            values.width,
            values.num_frozen,
            *values.strides,
            given.stride(0),
            out.stride(0),
            *numbers_of(rule),
        )
        constants = {
            "SPLITS": splits,
            "TOP_K": min(rule.top_k, num_atoms),
            "HAS_THRESHOLD": rule.threshold > 0,
            "HAS_RESIDUAL": residual is not None,
            "BLOCK_N": block,
            "BLOCK_O": block_o,
            "num_warps": max(1, min(8, block // 512)),
        }
        grid = (num_rows, cdiv(values.width, block_o))
        return Launch(_decode_kernel, grid, numbers, constants)

    launch((partial, *values.pieces, given, out), describe, steps)


def config(num_atoms: int, width: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_O) for a bank."""
    block = max(16, next_power_of_2(num_atoms))
    return block, min(256, next_power_of_2(width))
