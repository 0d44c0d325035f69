"""The public operator: checks its arguments, picks a backend, flattens the leading dimensions."""

import math

import torch

from .activation import SelfActivation
from .ops import retrieve_torch
from .reference import retrieve_reference

BACKENDS = ("auto", "reference", "torch", "triton")


def available_backends():
    """Names of the backends that run on this machine, without "auto"."""
    return tuple(name for name in BACKENDS if name != "auto" and why_unavailable(name) is None)


def why_unavailable(backend):
    """Why an explicitly named backend cannot run here, one sentence, or None if it can."""
    if backend == "triton":
        return (
            "this version of moram_kernels has no Triton kernels yet; "
            'use backend="torch" (any device) or backend="auto"'
        )
    return None


def retrieve(
    x,
    keys,
    values,
    activation,
    *,
    current_keys=None,
    current_values=None,
    residual=None,
    training=False,
    backend="auto",
    num_frozen=None,
):
    """Read a memory update for each token from a bank of rank-1 atoms.

    update = sum_i w_i s_i values_i with s = x keys^T over the frozen and the current atoms together
    and w the softmax of the top_k normalised scores; see `SelfActivation`. Gradients flow to x, the
    residual and the current segment only.

    Args:
        x: inputs [..., D], any floating dtype; may be non-contiguous or empty.
        keys: keys of the frozen atoms [F, D]; F may be 0 if there are current atoms.
        values: values of the frozen atoms [F, O], dtype of keys.
        activation: `SelfActivation`.
        current_keys, current_values: the trainable atoms [C, D] and [C, O], both or neither.
        residual: added to the update, [..., O]; saves one pass over the output.
        training: if true, the threshold is not applied.
        backend: "auto", "reference", "torch" or "triton". Only "auto" chooses: the fastest backend
            that runs on the tensors' device.
        num_frozen: live rows of keys and values if they have spare capacity, an int64 CPU tensor
            without dimensions; the rows after them are never read. torch.compile does not
            specialise on its value.
    Returns:
        residual + update [..., O] in the dtype of residual, or of x where there is none. Scores,
        norm, softmax and sums are float32 (float64 for float64 inputs), autocast or not.
    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shape, dtype, device or name mismatch; the message names argument and value.
        RuntimeError: the backend asked for by name cannot run here, or create_graph=True asks the
            torch backend for a second derivative. It has none; for a few thousand scores it leaves
            the work to autograd, which does. The reference always has one.
    Source: Lu et al., ICML 2026, arXiv 2506.21035 (self-activation, sparse selection).
    Cost: 2 M N D FLOPs for the scores plus 2 M top_k O for the values of large banks.
    """
    if current_keys is None and current_values is None:
        current_keys, current_values = _no_atoms(keys), _no_atoms(values)
    _check(x, keys, values, activation, current_keys, current_values, residual, num_frozen)
    backend = pick_backend(backend)
    lead = x.shape[:-1]
    if len(lead) != 1:
        rows = math.prod(lead)
        x = x.reshape(rows, x.shape[-1])
        residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
    if keys.requires_grad or values.requires_grad:
        keys, values = keys.detach(), values.detach()
    bank = (keys, values, current_keys, current_values)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            output = _run(backend, x, bank, activation, residual, training, num_frozen, True)
    else:
        output = _run(backend, x, bank, activation, residual, training, num_frozen, False)
    return output if len(lead) == 1 else output.view(*lead, output.shape[-1])


def _no_atoms(like):
    """An empty segment next to a segment; not a matrix where the segment is not one."""
    if not isinstance(like, torch.Tensor) or like.dim() != 2:
        return like
    return like.new_empty(0, like.shape[1])


def pick_backend(backend):
    """The backend that runs for a name: itself, or for "auto" the torch backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "torch"
    reason = why_unavailable(backend)
    if reason:
        raise RuntimeError(f'backend="{backend}" cannot run: {reason}')
    return backend


def _run(backend, x, bank, activation, residual, training, num_frozen, autocast):
    if backend == "torch":
        settings = (
            activation.top_k,
            activation.temperature,
            activation.threshold,
            activation.eps,
        )
        return retrieve_torch(x, *bank, residual, settings, training, num_frozen, autocast)
    keys, values, current_keys, current_values = bank
    if num_frozen is not None:
        keys, values = keys[: int(num_frozen)], values[: int(num_frozen)]
    all_keys = torch.cat([keys, current_keys])
    all_values = torch.cat([values, current_values])
    return retrieve_reference(x, all_keys, all_values, activation, residual, training)


def _check(x, keys, values, activation, current_keys, current_values, residual, num_frozen):
    tensors = {
        "x": x,
        "keys": keys,
        "values": values,
        "current_keys": current_keys,
        "current_values": current_values,
    }
    if residual is not None:
        tensors["residual"] = residual
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            hint = ""
            if tensor is None and name.startswith("current_"):
                hint = "; give both current_keys and current_values or neither"
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{hint}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
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
    for name in ("values", "current_keys", "current_values"):
        if tensors[name].dtype != keys.dtype:
            raise ValueError(
                f"{name} must have the dtype of keys, {keys.dtype}, got {tensors[name].dtype}"
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


def _check_num_frozen(num_frozen, keys):
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
