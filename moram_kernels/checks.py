"""Whether the arguments of the operator go together. No number is read, and no backend picked."""

import math

import torch
from torch import Tensor

from .activation import SelfActivation
from .aliases import Bank

_NAMES = ("x", "keys", "values", "current_keys", "current_values", "residual")


def checked(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    activation: SelfActivation,
    current_keys: Tensor | None,
    current_values: Tensor | None,
    residual: Tensor | None,
    num_frozen: Tensor | None,
) -> Bank:
    """The bank of a call whose arguments go together, frozen atoms detached.

    Args and what raises: as for `moram_kernels.retrieve`.
    """
    if current_keys is None and current_values is None:
        current_keys, current_values = _no_atoms(keys), _no_atoms(values)
    tensors = (x, keys, values, current_keys, current_values, residual)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            if tensor is None and name == "residual":
                continue
            hint = ""
            if tensor is None and name.startswith("current_"):
                hint = "; give both current_keys and current_values or neither"
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{hint}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    assert current_keys is not None and current_values is not None
    if not isinstance(activation, SelfActivation):
        raise TypeError(f"activation must be a SelfActivation, got {type(activation).__name__}")
    if x.dim() < 1:
        raise ValueError(f"x must be [..., D], got {tuple(x.shape)}")
    width = x.shape[-1]
    if keys.dim() != 2 or keys.shape[1] != width:
        raise ValueError(f"keys must be [F, {width}] to match x, got {tuple(keys.shape)}")
    if values.dim() != 2 or values.shape[0] != keys.shape[0]:
        raise ValueError(
            f"values must be [{keys.shape[0]}, O], one row per key, got {tuple(values.shape)}"
        )
    out = values.shape[1]
    if current_keys.dim() != 2 or current_keys.shape[1] != width:
        raise ValueError(
            f"current_keys must be [C, {width}] to match x, got {tuple(current_keys.shape)}"
        )
    if current_values.shape != (current_keys.shape[0], out):
        raise ValueError(
            f"current_values must be {(current_keys.shape[0], out)} to match current_keys and "
            f"values, got {tuple(current_values.shape)}"
        )
    for name, tensor in zip(_NAMES[2:5], (values, current_keys, current_values), strict=True):
        if tensor.dtype != keys.dtype:
            raise ValueError(
                f"{name} must have the dtype of keys, {keys.dtype}, got {tensor.dtype}"
            )
    if residual is not None and residual.shape != (*x.shape[:-1], out):
        raise ValueError(
            f"residual must be {(*x.shape[:-1], out)}, x's leading shape and O, "
            f"got {tuple(residual.shape)}"
        )
    if num_frozen is not None:
        _check_num_frozen(num_frozen, keys)
    if keys.shape[0] + current_keys.shape[0] < 1:
        raise ValueError("keys and current_keys hold no atom; at least one is needed")
    return bank_of(keys, values, current_keys, current_values)


def check_scores(scores: Tensor, x: Tensor, bank: Bank, num_frozen: Tensor | None) -> None:
    """Raise unless scores are those of x and all live atoms of a bank, in float32.

    Args:
        scores: to check. x: [.., D]. bank: `Bank`.
        num_frozen: live rows of the frozen atoms, or None for all.
    """
    frozen = bank.keys.shape[0] if num_frozen is None else int(num_frozen)
    shape = (math.prod(x.shape[:-1]), frozen + bank.current_keys.shape[0])
    if not isinstance(scores, torch.Tensor) or scores.dtype != torch.float32:
        raise TypeError(f"scores must be a float32 tensor, got {getattr(scores, 'dtype', scores)}")
    if scores.shape != shape or scores.device != x.device or scores.stride(1) != 1:
        raise ValueError(
            f"scores must be {shape} on {x.device} with unit column stride, got "
            f"{tuple(scores.shape)} on {scores.device} with strides {scores.stride()}"
        )


def bank_of(
    keys: Tensor, values: Tensor, current_keys: Tensor | None, current_values: Tensor | None
) -> Bank:
    """The bank of a call; frozen atoms have no gradient.

    Args:
        keys, values: [F, D] and [F, O]. current_keys, current_values: [C, D] and [C, O], or None.
    """
    if current_keys is None or current_values is None:
        current_keys, current_values = _no_atoms(keys), _no_atoms(values)
    if keys.requires_grad:
        keys = keys.detach()
    if values.requires_grad:
        values = values.detach()
    return Bank(keys, values, current_keys, current_values)


def _no_atoms(like: Tensor) -> Tensor:
    """An empty segment next to a segment; not a matrix where the segment is not one."""
    if not isinstance(like, torch.Tensor) or like.dim() != 2:
        return like
    return like.new_empty(0, like.shape[1])


def _check_num_frozen(num_frozen: Tensor, keys: Tensor) -> None:
    if not isinstance(num_frozen, torch.Tensor) or num_frozen.dtype != torch.int64:
        raise TypeError(f"num_frozen must be an int64 CPU tensor, got {num_frozen!r}")
    if num_frozen.dim() or num_frozen.device.type != "cpu":
        raise ValueError(
            f"num_frozen must be a CPU tensor without dimensions, got {tuple(num_frozen.shape)} "
            f"on {num_frozen.device}"
        )
    if not torch.compiler.is_compiling() and not 0 <= int(num_frozen) <= keys.shape[0]:
        raise ValueError(
            f"num_frozen must be in [0, {keys.shape[0]}], the rows of keys, got {int(num_frozen)}"
        )
