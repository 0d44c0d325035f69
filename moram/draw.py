"""How trainable rows begin, and how they are replaced. A leaf."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def draw_rows(
    shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """New rows [.., D], uniform in +-1/sqrt(D) (Kaiming with a = sqrt(5)).

    Args:
        shape: of the result; D is its last size. like: tensor whose dtype and device it gets.
        generator: drawn where it lives: a CPU generator gives the same rows on every device.
    """
    device = like.device if generator is None else generator.device
    bound = 1 / math.sqrt(shape[-1])
    rows = torch.empty(shape, dtype=like.dtype, device=device)
    return rows.uniform_(-bound, bound, generator=generator).to(like.device)


def changes_parameters(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator: no gradients, and tensors that can be trained even under inference_mode."""

    @functools.wraps(function)
    def changed(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return changed
