"""One table of rows in two pieces, frozen and current, as kernels and launchers see it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import rows


class Table(NamedTuple):
    """Keys or values of a bank [N, width]: `frozen` rows, then `current`; either may be empty."""

    frozen: Tensor
    current: Tensor

    @classmethod
    def of(cls, frozen: Tensor, current: Tensor) -> "Table":
        """A table from two matrices of equal width, which are not copied if rows are contiguous."""
        return cls(rows(frozen), rows(current))

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

    @property
    def pieces(self) -> tuple[Tensor, Tensor]:
        """(frozen, current) for a kernel; the other one where one is empty."""
        if not self.current.shape[0]:
            return self.frozen, self.frozen
        return self.frozen if self.frozen.shape[0] else self.current, self.current

    @property
    def strides(self) -> tuple[int, int]:
        """Between rows of the pieces."""
        frozen, current = self.pieces
        return frozen.stride(0), current.stride(0)

    @property
    def joined(self) -> bool:
        """Whether the current rows lie right behind the frozen ones in one buffer."""
        frozen, current = self
        size = frozen.shape[0]
        if not size or not current.shape[0]:
            return True
        step = frozen.stride(0)
        follows = frozen.data_ptr() + size * step * frozen.itemsize
        if current.data_ptr() != follows or current.stride(0) != step:
            return False
        return current.untyped_storage().data_ptr() == frozen.untyped_storage().data_ptr()

    @property
    def whole(self) -> Tensor | None:
        """All rows as one matrix, where they are joined."""
        if not self.joined:
            return None
        frozen = self.pieces[0]
        return frozen.as_strided((self.num_rows, self.width), (frozen.stride(0), 1))

    def matrix(self, copy: bool) -> Tensor | None:
        """All rows as one matrix: `whole`, else a copy, or None where none is to be made."""
        whole = self.whole
        return torch.cat(self) if whole is None and copy else whole


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
