"""Bytes that kernels read and write, per argument, counted by Triton's interpreter.

A load or store of one program counts every address once: lanes that repeat an address (rows past
the end of a tensor repeat its last one) get it from the cache line that is there already. So does
a sector, 32 bytes, the unit in which memory moves. Compilation, caches and banks are not seen.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from launches import intercepted
from triton.runtime.interpreter import InterpreterBuilder

SECTOR = 32


class Moved(NamedTuple):
    """Bytes: counted as often as they moved, each address once, and in whole sectors."""

    total: int
    distinct: int
    sectors: int


@dataclass
class Launch:
    """What one launch touched; accesses: {(argument names, "read" or "write"): addresses}.

    A tensor that was given as several arguments has all their names.
    """

    kernel: str
    grid: tuple
    meta: dict
    tensors: dict
    accesses: dict = field(default_factory=lambda: defaultdict(list))

    def note(self, kind, addresses, mask, itemsize):
        # The interpreter's masks are not always of type bool.
        mask = np.broadcast_to(mask, addresses.shape).astype(bool)
        addresses = np.unique(addresses[mask].astype(np.int64))
        known = np.zeros(addresses.shape, dtype=bool)
        for names, tensor in self.tensors.items():
            inside = is_element(tensor, addresses) & ~known
            known |= inside
            if inside.any():
                assert tensor.element_size() == itemsize, (self.kernel, names)
                self.accesses[names, kind].append(addresses[inside])
        where = f"{self.kernel} {kind}s {(~known).sum()} addresses outside its arguments"
        assert known.all(), where

    def moved(self):
        """{(argument names, "read" or "write"): `Moved`}."""
        sizes = {names: t.element_size() for names, t in self.tensors.items()}
        return {
            (names, kind): Moved(
                sum(map(len, parts)) * sizes[names],
                len(np.unique(np.concatenate(parts))) * sizes[names],
                sum(len(np.unique(part // SECTOR)) for part in parts) * SECTOR,
            )
            for (names, kind), parts in self.accesses.items()
        }


def is_element(tensor, addresses):
    """Which byte addresses are those of a tensor's elements, gaps between its rows excluded."""
    left = addresses - tensor.data_ptr()
    inside = left >= 0
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
    for stride, size in dims:
        step = stride * tensor.element_size()
        # A dimension of one element has any stride.
        index = left // step if size > 1 else np.zeros_like(left)
        inside &= index < size
        left = left - index * step
    return inside & (left == 0) & (tensor.numel() > 0)


@contextmanager
def measured():
    """Within the block the list that it yields grows by a `Launch` per launch; atomics fail."""
    launches = []
    real = {
        name: getattr(InterpreterBuilder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
        )
    }

    def note(launch, kernel, grid, *args, **meta):
        tensors = {}
        for name, value in zip(kernel.arg_names, args, strict=False):
            if isinstance(value, torch.Tensor):
                place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
                names, _ = tensors.get(place, ((), None))
                tensors[place] = ((*names, name.removesuffix("_ptr")), value)
        launches.append(Launch(kernel.__name__, grid, meta, dict(tensors.values())))
        return launch(kernel, grid, *args, **meta)

    # Loads and stores without a mask call these, too.
    def load(self, pointers, mask, *args):
        launches[-1].note("read", pointers.data, mask.data, itemsize(pointers))
        return real["create_masked_load"](self, pointers, mask, *args)

    def store(self, pointers, value, mask, *args):
        launches[-1].note("write", pointers.data, mask.data, itemsize(pointers))
        return real["create_masked_store"](self, pointers, value, mask, *args)

    def refuse(self, *args):
        raise AssertionError(f"{launches[-1].kernel} uses an atomic")

    for name, replacement in zip(real, (load, store, refuse, refuse), strict=True):
        setattr(InterpreterBuilder, name, replacement)
    try:
        with intercepted(note):
            yield launches
    finally:
        for name, function in real.items():
            setattr(InterpreterBuilder, name, function)


def itemsize(pointers):
    return pointers.get_element_ty().primitive_bitwidth // 8


def assert_moves(launch, reads, writes, sectors=True, single=()):
    """A launch read and wrote exactly this much, and no other argument.

    Args:
        reads, writes: {argument: (distinct bytes, bytes counted as often as they moved)}.
        sectors: whether whole sectors may be at most a tenth more, of rows of a sector or longer.
        single: arguments of which a program takes one number, hence a sector.
    """
    expected = {(name, "read"): size for name, size in reads.items() if size[1]}
    expected |= {(name, "write"): size for name, size in writes.items() if size[1]}
    found = launch.moved()
    for (names, kind), moved in found.items():
        claims = [name for name in names if (name, kind) in expected]
        assert len(claims) == 1, f"{launch.kernel} {kind}s {names}, expected {list(expected)}"
        where = f"{launch.kernel} {kind} {claims[0]}"
        distinct, total = expected.pop((claims[0], kind))
        assert (moved.distinct, moved.total) == (distinct, total), f"{where}: {moved}"
        tensor = launch.tensors[names]
        if claims[0] in single:
            assert moved.sectors == SECTOR / tensor.element_size() * total, f"{where}: {moved}"
        elif sectors and tensor.shape[-1] * tensor.element_size() >= SECTOR:
            assert moved.sectors <= 1.1 * moved.total, f"{where}: {moved}"
    assert not expected, f"{launch.kernel} did not touch {list(expected)}"
