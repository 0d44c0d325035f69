"""What every adapter shares: its tensors are saved without those of the module that it wraps."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..draw import changes_parameters


class Calls:
    """Whether an adapter was called. An object of its own: setting it costs a forward nothing, and
    torch.compile sets it without a guard."""

    def __init__(self) -> None:
        self.seen: bool = False


class Adapter(nn.Module):
    """Wraps a module, which it freezes and never copies; subclasses add an update in `forward`.

    Args:
        base_layer: the module to wrap.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer.requires_grad_(False)
        # Every forward sets `seen`.
        self.calls: Calls = Calls()

    @property
    def is_active(self) -> bool:
        """Whether it adds an update; one of several PEFT adapters may leave this layer alone."""
        return True

    def adapter_state(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, by name, without those of the base."""
        state = self.state_dict()
        return {name: t for name, t in state.items() if not name.startswith("base_layer.")}

    @changes_parameters
    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `adapter_state` gave, also of an adapter that has grown since.

        Raises:
            ValueError: the names differ from this adapter's.
        """
        names = set(self.adapter_state())
        if names != set(state):
            raise ValueError(
                f"adapter state must hold {sorted(names)}, got {sorted(state)}: was it made by "
                "another method?"
            )
        for name, tensor in state.items():
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            present = getattr(module, last)
            tensor = tensor.detach().to(present.device, present.dtype, copy=True)
            if isinstance(present, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=present.requires_grad)
            setattr(module, last, tensor)


class AdapterLinear(Adapter):
    """Wraps a Linear and looks like it.

    Args:
        base_layer: an `nn.Linear` or a module that acts like one (also quantised): it has
            in_features, out_features and weight.
    Raises:
        TypeError: base_layer is no Linear, or one whose call does not go through its module.
    """

    # Or what acts like one.
    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Module) -> None:
        problem = why_not_linear(base_layer)
        if problem:
            raise TypeError(f"base_layer must be a Linear: {problem}")
        super().__init__(base_layer)
        base = self.base_layer
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    @property
    def weight(self) -> Tensor:
        """The base weight, as the base stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias or None."""
        return self.base_layer.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class OffloadHook(Protocol):
    """What is used of accelerate's hook that brings the weights of a module."""

    execution_device: torch.device | str | int
    weights_map: Mapping[str, Tensor]
    place_submodules: bool


def device_of(linear: nn.Linear) -> torch.device:
    """Where a Linear computes: where its weight is, or where accelerate brings it if offloaded."""
    hook = _offload_hook(linear)
    return linear.weight.device if hook is None else torch.device(hook.execution_device)


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight of a Linear or of an adapter's, also of one that accelerate has offloaded."""
    base = cast(nn.Linear, getattr(linear, "base_layer", linear))
    hook = _offload_hook(base)
    return base.weight if hook is None else hook.weights_map["weight"]


def _offload_hook(linear: nn.Linear) -> OffloadHook | None:
    """The hook that holds a Linear's weight while it is on the meta device, or None."""
    return next(offload_hooks(linear), None) if linear.weight.is_meta else None


def offload_hooks(module: nn.Module) -> Iterator[OffloadHook]:
    """The hooks by which accelerate brings a module's weights when it is called."""
    hook = getattr(module, "_hf_hook", None)
    hooks: list[Any] = [hook, *getattr(hook, "hooks", ())]
    for each in hooks:
        if getattr(each, "weights_map", None) is not None:
            yield each


def why_not_linear(module: object) -> str | None:
    """Why a module cannot be wrapped, one sentence, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, AdapterLinear):
        return f"it is already adapted ({kind}); eject the adapters first"
    if kind == "Conv1D":
        return "Conv1D (GPT-2) stores its weight transposed and is not supported"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "it belongs to an nn.MultiheadAttention, which reads its weight and never calls it; "
            "split the attention first (moram.models.split_attention)"
        )
    if not isinstance(module, nn.Module):
        return f"got {kind}"
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes) or not isinstance(
        getattr(module, "weight", None), torch.Tensor
    ):
        return f"got {kind}, which lacks in_features, out_features or weight"
    return None
