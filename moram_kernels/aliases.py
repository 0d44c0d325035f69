"""Types that several files share. No code lives here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """The settings of a `SelfActivation`; to kernels a threshold of 0 says that there is none."""

    top_k: int
    temperature: float
    threshold: float
    eps: float


class Bank(NamedTuple):
    """Frozen keys [F, D] and values [F, O], then current ones [C, D] and [C, O]."""

    keys: Tensor
    values: Tensor
    current_keys: Tensor
    current_values: Tensor

    @property
    def num_atoms(self) -> int:
        """Rows of both segments."""
        return self.keys.shape[0] + self.current_keys.shape[0]


# Of x, the current keys and the current values; None where none is wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# A kernel's blocks, warps and stages; then those of all kernels by name, beside numbers of splits.
Tile = Mapping[str, int]
Tiles = Mapping[str, Any]
