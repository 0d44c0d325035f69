"""Layers that read the same input score their banks together."""

import weakref

import torch

from moram_kernels.sharing import shared_scores


class SharedInput:
    """The banks of two or three `MoRAMLinear`s that are called with one and the same tensor.

    The first of them to be called scores all banks in one launch where that pays; the others find
    their scores here. A tensor is recognised by identity and version, so layers that turn out to
    read different inputs only lose the sharing, which then turns itself off.
    """

    def __init__(self, layers):
        self.layers = tuple(layers)
        self.enabled = True
        self._clear()

    def __getstate__(self):
        return {"layers": self.layers, "enabled": self.enabled}

    def __setstate__(self, state):
        self.__init__(state["layers"])
        self.enabled = state["enabled"]

    def scores(self, layer, x):
        """The scores of a layer's bank for x, or None."""
        if not self.enabled:
            return None
        if self._seen() is not x or self._version != x._version or id(layer) not in self._waiting:
            if self._waiting:
                # Someone was called with another tensor: these layers do not share their input.
                self.enabled = False
                self._clear()
                return None
            self._score(layer, x)
        scores = self._waiting.pop(id(layer), None)
        if not self._waiting:
            self._clear()
        return scores

    def _score(self, layer, x):
        found = shared_scores(
            x,
            [other.bank.segments() for other in self.layers],
            layer.activation,
            training=layer.training and torch.is_grad_enabled(),
            backend=layer.backend,
            precision=layer.config.precision,
        )
        if found is not None:
            self._seen, self._version = weakref.ref(x), x._version
            self._waiting = {id(o): s for o, s in zip(self.layers, found, strict=True)}

    def _clear(self):
        self._seen, self._version, self._waiting = (lambda: None), None, {}
