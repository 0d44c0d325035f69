"""Loads and stores of global memory: inside tensors, aligned, and each byte one CTA's to write."""

import numpy as np


class GlobalMemory:
    """What a batch of CTAs does to tensors.

    Args:
        threads: of the batch. space: the `Space` with the launch's tensors.
    """

    def __init__(self, threads, space):
        self.threads, self.space = threads, space
        # Number of each thread's CTA in the launch, plus 1.
        self.owner = (threads.ctas[threads.cta] + 1).astype(np.int32)

    def load(self, mask, base, offset, form, old, mark):
        size, count, _, _ = form
        found, sel = self._access(mask, base, offset, size * count, mark, False)
        number = self.threads.size if sel is None else len(sel)
        parts = []
        for k in range(count):
            values = np.empty(number, f"u{size}")
            for region, at, part in found:
                values[slice(None) if part is None else part] = region.views[size][at // size + k]
            parts.append(self.threads.widened(values, form))
        return self.threads.placed(parts, sel, old, form)

    def store(self, mask, base, offset, size, values, mark):
        threads = self.threads
        found, sel = self._access(mask, base, offset, size * len(values), mark, True)
        for region, at, part in found:
            cells, first = region.views[size], at // size
            lanes = _within(sel, part)
            for k, value in enumerate(values):
                value = threads.full(value)
                value = value if lanes is None else value[lanes]
                cells[first + k] = value
                lost = cells[first + k] != value
                threads.check_agreement(lost, first, lanes, mark, region.name)

    def _access(self, mask, base, offset, width, mark, stores):
        """([(region, offsets, which of the active threads)], active threads), after all checks."""
        threads = self.threads
        sel = threads.selected(mask)
        address = threads.full(base).view(np.int64)
        address = (address if sel is None else address[sel]) + offset
        if not address.size:
            return [], sel

        def check(kind, message, bad, part=None):
            if bad.any():
                who = int(np.flatnonzero(bad)[0])
                lanes = _within(sel, part)
                raise threads.trap(
                    kind, message(who), mark, who if lanes is None else int(lanes[who])
                )

        what = f"{'store' if stores else 'load'} of {width} bytes"
        odd = address & (width - 1) != 0
        check("alignment", lambda who: f"{what} at address {int(address[who]):#x}", odd)
        found = []
        for region, part in self.space.split(address):
            at = address if part is None else address[part]
            every = np.ones(len(at), bool)
            if region is None:
                check("global", lambda who: f"{what} outside of all tensors", every, part)
            at = at - region.base

            def place(who, region=region, at=at):
                size = region.high - region.low
                return f"{what} at byte {int(at[who]) - region.low} of {region.name}, {size} bytes"

            check("global", place, region.outside(at, width), part)
            if not region.read_only:
                lanes = _within(sel, part)
                mine = self.owner if lanes is None else self.owner[lanes]
                check(
                    "CTAs", lambda who, place=place: f"{place(who)}, which another CTA touches",
                    _contested(region, at, width, mine, stores), part,
                )  # fmt: skip
            elif stores:
                check("read-only", place, every, part)
            if threads.counts:
                threads.counts.touched(region.name, at, width, _within(sel, part), stores)
            found.append((region, at, part))
        return found, sel


def _within(sel, part):
    """Numbers of the threads that are a part of the selected ones, None for all."""
    if part is None:
        return sel
    return part if sel is None else sel[part]


def _contested(region, at, width, mine, stores):
    """Which accesses meet another CTA's, of which one writes; remembers them all."""
    loaded, stored = region.owners()
    contested = np.zeros(len(at), bool)
    first = at // region.unit
    for number in range(-(-width // region.unit)):
        i = first + number
        contested |= (stored[i] != 0) & (stored[i] != mine)
        before = loaded[i]
        if stores:
            contested |= (before != 0) & (before != mine)
            stored[i] = mine
            # Another CTA stored to it with the same instruction.
            contested |= stored[i] != mine
        else:
            loaded[i] = mine
            several = (loaded[i] != mine) | ((before != 0) & (before != mine))
            loaded[i[several]] = -1
    return contested
