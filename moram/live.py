"""How a bank's number of frozen atoms is kept in a tensor. A leaf."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor

# What the tensor counts in: an average of equal counts, which may be cut to a whole number, stays
# within a small part of a unit, and most averages of different ones do not look like a count.
UNIT = 2**20


def count_of(live: Tensor) -> int:
    """The number of atoms that a `live` tensor stands for; waits for its device.

    Raises:
        RuntimeError: it is an average of different numbers, or a stack of them.
    """
    if is_batchedtensor(live):
        live = get_unwrapped(live)
    if not live.dim():
        count, rest = divmod(int(live), UNIT)
        if not rest:
            return count
    values = {int(value) for value in live.reshape(-1)}
    first = next(iter(values))
    count = round(first / UNIT)
    if len(values) > 1 or abs(first - count * UNIT) > UNIT // 1000:
        raise RuntimeError(
            "live must be one number of frozen atoms, got "
            f"{', '.join(f'{value / UNIT:.3g}' for value in sorted(values))}: banks of different "
            "sizes cannot be averaged or stacked"
        )
    return count


def filled_rows(tables: Sequence[Tensor]) -> int:
    """Rows before the zeros at the end of tables: spare rows are zero, and atoms are not."""
    filled = torch.stack([table.any(1) for table in tables]).any(0).nonzero()
    return int(filled.max()) + 1 if len(filled) else 0
