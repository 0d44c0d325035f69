"""The settings of self-activation, checked once. No tensors live here."""

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True, slots=True)
class SelfActivation:
    """How the atoms' scores become mixture weights.

    Args:
        top_k: atoms selected per token, an integer >= 1; clipped to the number of atoms.
        temperature: softmax temperature over the selected atoms, > 0.
        threshold: at inference, atoms whose normalised score is below it write nothing;
            in [0, 1), 0 = off. Weights are not renormalised.
        eps: lower bound of the norm that scores are divided by, > 0.
    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting is out of range; the message names it.
    Source: Lu et al., ICML 2026, arXiv 2506.21035 (self-activation, sparse selection).
    """

    top_k: int = 8
    temperature: float = 0.03
    threshold: float = 0.2
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral):
            raise TypeError(f"top_k must be an integer >= 1, got {self.top_k!r}")
        for name in ("temperature", "threshold", "eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and > 0, got {self.temperature}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1) (0 turns it off), got {self.threshold}")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"eps must be finite and > 0, got {self.eps}")
        # Plain Python numbers from here on, whatever kind of number came.
        object.__setattr__(self, "top_k", int(self.top_k))
        for name in ("temperature", "threshold", "eps"):
            object.__setattr__(self, name, float(getattr(self, name)))
