"""Finds DistributedDataParallel wrappers that do not know new atoms, and says so when called."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


def watch_replicas(model: nn.Module) -> None:
    """Let wrappers that would leave gradients of the model apart raise at their next step.

    A wrapper adds up the gradients of the parameters that it found when it was made.

    Args:
        model: whose parameters have changed, wrapped or not.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    trainable = [p for p in model.parameters() if p.requires_grad]
    for wrapper in _around(trainable):
        if _unknown(wrapper):
            judge = _Judge()
            judge.handle = wrapper.register_forward_pre_hook(judge)


class _Judge:
    """Looks at a wrapper before its call."""

    def __init__(self) -> None:
        self.handle: RemovableHandle | None = None

    def __call__(self, wrapper: nn.Module, _: Any) -> None:
        assert isinstance(wrapper, DistributedDataParallel) and self.handle is not None
        if not _unknown(wrapper):
            self.handle.remove()
        elif torch.is_grad_enabled():
            raise RuntimeError(
                "DistributedDataParallel must be made after the atoms that it trains, got a "
                "wrapper from before: it would not add up their gradients, and the processes would "
                "drift apart; wrap the model anew"
            )


def _unknown(wrapper: DistributedDataParallel) -> list[str]:
    """Names of trainable parameters that a wrapper neither knows nor was told to ignore."""
    known = {id(p) for p in wrapper._module_parameters}
    return [
        name
        for name, p in wrapper.module.named_parameters()
        if p.requires_grad and id(p) not in known and name not in wrapper.parameters_to_ignore
    ]


def _around(parameters: Sequence[Tensor]) -> Iterator[DistributedDataParallel]:
    """Wrappers of modules that hold one of the parameters; these leave no trace on the model."""
    wanted = {id(p) for p in parameters}
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and not wanted.isdisjoint(
            id(p) for p in found.module.parameters()
        ):
            yield found
