"""Layers that read the same input score their banks together."""

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moram_kernels.ops import version_of
from moram_kernels.sharing import shared_scores

from ..bank import AtomBank

if TYPE_CHECKING:
    from .moram import MoRAMLinear

# By a layer's id, its scores and what its bank was.
Waiting = dict[int, tuple[Tensor, tuple[object, ...]]]


class SharedInput:
    """The banks of two or three `MoRAMLinear`s that are called with one and the same tensor.

    The first of them to be called scores all banks in one launch where that pays; the others find
    their scores here, as long as input and bank are what they were: the same tensors, unchanged
    (a change through `.data` cannot be seen, as in autograd). Layers that turn out to read
    different inputs only lose the sharing, which then turns itself off. Threads share nothing.
    """

    def __init__(self, layers: Iterable["MoRAMLinear"]) -> None:
        self.layers: tuple[MoRAMLinear, ...] = tuple(layers)
        self.enabled: bool = True
        self._found = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])
        self.enabled = state["enabled"]

    def scores(self, layer: "MoRAMLinear", x: Tensor) -> Tensor | None:
        """The scores of a layer's bank for x, or None."""
        if not self.enabled:
            return None
        seen, version, waiting = getattr(self._found, "state", (None, None, {}))
        if seen is None or seen() is not x or version != version_of(x) or id(layer) not in waiting:
            if waiting:
                # Someone was called with another tensor: these layers do not share their input.
                self.enabled = False
                self._found = threading.local()
                return None
            waiting = self._score(layer, x)
        scores, bank = waiting.pop(id(layer), (None, None))
        if not waiting:
            self._found.state = (None, None, {})
        return scores if bank == _bank_version(layer.bank) else None

    def _score(self, layer: "MoRAMLinear", x: Tensor) -> Waiting:
        found = shared_scores(
            x,
            [other.bank.segments() for other in self.layers],
            layer.activation,
            training=layer.training and torch.is_grad_enabled(),
            backend=layer.backend,
            precision=layer.config.precision,
        )
        waiting: Waiting = {}
        if found is not None:
            for other, scores in zip(self.layers, found, strict=True):
                waiting[id(other)] = scores, _bank_version(other.bank)
            self._found.state = (weakref.ref(x), version_of(x), waiting)
        return waiting


def _bank_version(bank: AtomBank) -> tuple[object, ...]:
    """What changes whenever the keys of a bank do."""
    keys = (bank.frozen_keys, bank.current_keys)
    found = ((id(t), t.shape[0], version_of(t)) for t in keys)
    return (bank.num_frozen, id(bank.guard), *found)
