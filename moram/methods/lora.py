"""Sequential LoRA: one adapter that goes on learning, the baseline without any protection."""

from collections.abc import Callable
from typing import Any, Generic, TypedDict, TypeVar, cast

import torch
from torch import nn

from ..config import MoRAMConfig, check_count
from ..inject import adapters, inject_with
from ..layers import AdapterLinear, LoRALinear
from .base import Method

L = TypeVar("L", bound=AdapterLinear)


class LoRAArguments(TypedDict, total=False):
    """The arguments of `LoRAMethod`, which its subclasses pass on."""

    rank: int
    alpha: float | None
    targets: str | tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    dropout: float


class LoRAMethod(Method, Generic[L]):
    """What all methods on LoRA share: their settings, and putting the layers in.

    Args:
        rank: trained per task; equal to MoRAM's atoms per task for as many trained parameters.
        alpha: the scale of an update is alpha / rank; None = 2 rank.
        targets, exclude: as in `MoRAMConfig`.
        seed: of the initial factors and of whatever else the method draws.
        dropout: probability of dropping an input feature before A sees it, in training.
    """

    layer: type[L]
    rank: int
    alpha: float | None
    targets: str | tuple[str, ...]
    exclude: tuple[str, ...]

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: str | tuple[str, ...] = "auto",
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        dropout: float = 0.0,
    ) -> None:
        check_count("rank", rank, 1)
        self.rank, self.alpha = rank, alpha
        # Its checks are theirs.
        names = MoRAMConfig(targets=targets, exclude=exclude)
        self.targets, self.exclude = names.targets, names.exclude
        self.dropout = dropout
        self.generator = torch.Generator().manual_seed(seed)

    def setup(self, model: nn.Module) -> None:
        inject_with(model, self.targets, self.exclude, self.wrap)

    def wrap(self, linear: nn.Module, **settings: Any) -> L:
        """The layer to put around a Linear."""
        settings |= {"dropout": self.dropout, "generator": self.generator}
        # Each kind of layer has settings of its own.
        make = cast(Callable[..., L], self.layer)
        return make(linear, self.rank, self.alpha, **settings)

    def layers(self, model: nn.Module) -> dict[str, L]:
        """This method's layers by path, in the order of the model."""
        return adapters(model, self.layer)


class SequentialLoRA(LoRAMethod[LoRALinear]):
    """One LoRA trained on task after task; nothing is frozen between them.

    Needs no task id. Stores one LoRA, whatever the number of tasks.

    Args:
        rank, alpha, targets, exclude, seed, dropout: see `LoRAMethod`.
    Source: Hu et al., ICLR 2022, arXiv 2106.09685 (the adapter).
    """

    name = "sequential LoRA"
    layer = LoRALinear
