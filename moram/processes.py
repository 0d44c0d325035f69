"""Data parallelism without a wrapper: the adapters' gradients, which are small, are summed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Processes:
    """This process among those that train together; one alone where none were started.

    The model needs no wrapping, so a bank may grow between steps. Every process must hold the
    same parameters and see the same effective batches, of which it takes every world-th row.

    Args:
        together: with the others; False = as if it were alone.
    """

    def __init__(self, together: bool = True) -> None:
        together = together and dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.world: int = dist.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @overload
    def share(self, rows: Tensor) -> Tensor: ...

    @overload
    def share(self, rows: Sequence[T]) -> Sequence[T]: ...

    def share(self, rows: Any) -> Any:
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

    def whole(self, rows: Tensor, count: int) -> Tensor:
        """The rows [count, ...] of all processes, undoing `share`; this one's own have a graph."""
        if self.world == 1:
            return rows
        places = torch.arange(self.rank, count, self.world, device=rows.device)
        others = rows.new_zeros(count, *rows.shape[1:])
        others[places] = rows.detach()
        self.sum([others])
        return others.index_copy(0, places, rows)

    def part(self, shared: Tensor) -> Tensor:
        """A tensor that all processes computed alike; its gradients add up over them."""
        if self.world == 1:
            return shared
        return shared.detach() + (shared - shared.detach()) / self.world

    @contextmanager
    def drawing_alike(self) -> Iterator[None]:
        """Torch's global generator on the CPU is the first process's in here."""
        if self.world == 1:
            yield
            return
        state = self.broadcast(torch.get_rng_state())
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            yield

    def first_then_others(self, function: Callable[[], T]) -> T:
        """What a function returns, called in the first process before the others: it may leave
        files that these find."""
        if not self.is_first:
            self.wait()
            return function()
        found = function()
        self.wait()
        return found

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
