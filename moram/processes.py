"""Data parallelism without a wrapper: the adapters' gradients, which are small, are summed."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Processes:
    """This process among those that train together; one alone where none were started.

    The model needs no wrapping, so a bank may grow between steps. Every process must hold the
    same parameters and see the same effective batches, of which it takes every world-th row.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.world: int = dist.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """The part of a sequence that this process works on."""
        return rows[self.rank :: self.world]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors of equal dtype over all processes, in place, in one message."""
        tensors = list(tensors)
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        sizes = [t.numel() for t in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, items: Iterable[T]) -> list[T]:
        """The lists of all processes, undoing `share`."""
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, list(items))
        merged: list[Any] = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            merged[rank :: self.world] = part
        return merged

    def broadcast(self, value: T) -> T:
        """The first process's value of a small picklable object."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


def leave() -> None:
    """End this process's membership; does nothing where it is alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
