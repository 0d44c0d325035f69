"""One table of rows in two pieces, frozen and current, as kernels and launchers see it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import rows


class Table(NamedTuple):
    """Keys or values of a bank [N, width]: `frozen` rows, then `current`; either may be empty.

    Where the current rows lie right behind the frozen ones in one buffer, `whole` is both.
    """

    frozen: Tensor
    current: Tensor
    whole: Tensor | None

    @classmethod
    def of(cls, frozen: Tensor, current: Tensor) -> "Table":
        """A table from two matrices of equal width, which are not copied if rows are contiguous."""
        frozen, current = rows(frozen), rows(current)
        return cls(frozen, current, _joined(frozen, current))

    @property
    def num_frozen(self) -> int:
        return self.frozen.shape[0]

    @property
    def num_rows(self) -> int:
        return self.frozen.shape[0] + self.current.shape[0]

    @property
    def width(self) -> int:
        return self.frozen.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes."""
        pieces = (piece for piece in (self.frozen, self.current) if piece.shape[0])
        return all(
            piece.data_ptr() % 16 == 0 and piece.stride(0) * piece.element_size() % 16 == 0
            for piece in pieces
        )

    def args(self) -> tuple[Tensor, Tensor, int, int, int]:
        """(frozen, current, num_frozen, stride of frozen, stride of current) for a kernel."""
        frozen = self.frozen if self.num_frozen else self.current
        current = self.current if self.current.shape[0] else self.frozen
        return frozen, current, self.num_frozen, frozen.stride(0), current.stride(0)


def _joined(frozen: Tensor, current: Tensor) -> Tensor | None:
    if current.shape[0] == 0:
        return frozen
    if frozen.shape[0] == 0:
        return current
    step = frozen.stride(0)
    follows = frozen.data_ptr() + frozen.shape[0] * step * frozen.element_size()
    storage = frozen.untyped_storage()
    if (
        current.data_ptr() != follows
        or current.stride(0) != step
        or current.untyped_storage().data_ptr() != storage.data_ptr()
    ):
        return None
    return frozen.as_strided((frozen.shape[0] + current.shape[0], frozen.shape[1]), (step, 1))


@triton.jit
def row_pointers(
    index, frozen_ptr, current_ptr, num_frozen, stride_frozen, stride_current, ALIGNED: tl.constexpr
):
    """Pointers to the first element of the named rows of a table."""
    wide = index.to(tl.int64)
    pointers = tl.where(
        index < num_frozen,
        frozen_ptr + wide * stride_frozen,
        current_ptr + (wide - num_frozen) * stride_current,
    )
    if ALIGNED:
        # The compiler loses this in the choice, and with it asynchronous copies of 16 bytes.
        pointers = tl.multiple_of(pointers, 16)
    return pointers
