"""Tensors of the CPU at invented addresses, and which bytes there belong to them.

Every storage has an address range of its own, 2^40 bytes from the next, so that whatever is
computed beyond a tensor hits nothing. Addresses keep the alignment of the real ones.
"""

import ctypes

import numpy as np

SPACING = 40


class Region:
    """The storage of one or more tensors; only bytes of their elements may be touched.

    Offsets count from `base`, the address of a multiple of 16 bytes at or before the storage.
    """

    def __init__(self, number, pointer, size):
        self.shift = pointer % 16
        self.pointer = pointer - self.shift
        # Whole vectors can be viewed; what lies outside of the storage is never touched.
        count = -(-(size + self.shift) // 16) * 16
        cells = np.frombuffer((ctypes.c_uint8 * count).from_address(self.pointer), np.uint8)
        self.views = {width: cells.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.base = (number + 1 << SPACING) + self.pointer % 4096
        self.low = self.high = 0
        # Bytes that one owner has: the smallest element. read_only: nobody may write here.
        self.unit, self.read_only = 1, False
        self._names, self._tensors = [], []
        # Which bytes are allowed: (from row to row, of a row), or one flag a unit, or all.
        self._rows = self._allowed = None
        self._owners = None

    @property
    def name(self):
        return "/".join(dict.fromkeys(self._names))

    def add(self, name, tensor):
        """Let a tensor's bytes be touched; returns its address."""
        self._names.append(name)
        self._tensors.append(tensor)
        self.unit = min(one.element_size() for one in self._tensors)
        filled = [one for one in self._tensors if one.numel()]
        if filled:
            spans = [self._span(one) for one in filled]
            self.low, self.high = min(low for low, _ in spans), max(high for _, high in spans)
            self._allow(filled, spans)
        return self.base + tensor.data_ptr() - self.pointer

    def _span(self, tensor):
        low = tensor.data_ptr() - self.pointer
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((count - 1) * stride for count, stride in steps)
        return low, low + tensor.element_size() * (last + 1)

    def _allow(self, tensors, spans):
        self._rows = self._allowed = None
        whole = self.high - self.low
        for (low, high), one in zip(spans, tensors, strict=True):
            if high - low == whole and one.numel() * one.element_size() == whole:
                return
        first = tensors[0]
        if len(tensors) == 1 and first.dim() == 2 and first.stride(1) == 1:
            size = first.element_size()
            self._rows = first.stride(0) * size, first.shape[1] * size
            return
        allowed = np.zeros(-(-whole // self.unit), bool)
        for (low, _), one in zip(spans, tensors, strict=True):
            each = one.element_size() // self.unit
            at = np.zeros((), np.int64)
            for count, stride in zip(one.shape, one.stride(), strict=True):
                at = at[..., None] + np.arange(count) * (stride * each)
            for part in range(each):
                allowed[at.ravel() + (low - self.low) // self.unit + part] = True
        self._allowed = allowed

    def outside(self, offset, width):
        """Which accesses [n] of `width` bytes touch a byte of no tensor."""
        bad = (offset < self.low) | (offset + width > self.high)
        if bad.any():
            return bad
        if self._rows is not None:
            step, row = self._rows
            at = offset - self.low
            return (at % step if step else at) + width > row
        if self._allowed is not None:
            first = (offset - self.low) // self.unit
            for part in range(-(-width // self.unit)):
                bad |= ~self._allowed[first + part]
        return bad

    def owners(self):
        """(CTA that loaded, CTA that stored) of every unit, plus 1: 0 is nobody, -1 several."""
        if self._owners is None:
            count = -(-self.high // self.unit) + 16
            self._owners = np.zeros(count, np.int32), np.zeros(count, np.int32)
        return self._owners


class Space:
    """All tensors that a launch knows."""

    def __init__(self):
        self._regions, self._by_pointer = [], {}

    def add(self, name, tensor, read_only=False):
        """Make a tensor known; returns the address that a kernel is told."""
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return (1 << 12 + SPACING) + (len(self._regions) << SPACING)
        if pointer not in self._by_pointer:
            region = Region(len(self._regions), pointer, size)
            self._regions.append(region)
            self._by_pointer[pointer] = region
        region = self._by_pointer[pointer]
        region.read_only |= read_only
        return region.add(name, tensor)

    def split(self, address):
        """[(region or None, which of them, None for all)] of addresses [n]."""
        number = (address >> SPACING) - 1
        if (number == number[0]).all():
            return [(self._region(number[0]), None)]
        return [(self._region(one), np.flatnonzero(number == one)) for one in np.unique(number)]

    def _region(self, number):
        return self._regions[number] if 0 <= number < len(self._regions) else None
