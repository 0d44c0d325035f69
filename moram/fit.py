"""Whether a checkpoint fits a model: its layers, their sizes, and the base they were trained on.

Changes nothing. What a refusal leaves as it was is up to `checkpoint`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .beside import has_other_adapters
from .inject import adapters
from .layers import MoRAMLinear
from .layers.base import stored_weight, why_not_linear
from .targets import why_not_alone
from .wrappers import plain_names, plain_paths, plain_tensors

_SAMPLES = 64


def check_fit(model: nn.Module, about: Mapping[str, Any]) -> dict[str, str]:
    """Where in the model each layer of the checkpoint is: {path without wrappers: path}."""
    actual, wanted = plain_paths(model), about["layers"]
    if about.get("other_adapters") and not has_other_adapters(model):
        raise ValueError(
            "model must hold the PEFT adapter beside which the checkpoint was trained; load that "
            f"one first{_made(about)}"
        )
    names = plain_names(model)
    present = {names[path] for path in adapters(model)}
    if "" in wanted and not present:
        raise ValueError(
            f"model must hold the adapted Linear, got a {type(model).__name__} itself; load into "
            "MoRAMLinear.from_linear(model)"
        )
    if present and present != set(wanted):
        odd = sorted(present ^ set(wanted))
        raise ValueError(
            f"model and checkpoint adapt different projections, for example {odd[0]}; "
            "load into the plain base model"
        )
    check_layers(model, about)
    return actual


def check_layers(model: nn.Module, about: Mapping[str, Any]) -> None:
    """Raise unless a model has the layers of a checkpoint, in their sizes and with their weights.

    Raises:
        ValueError: it says which layer.
    """
    actual = plain_paths(model)
    modules = {plain: model.get_submodule(path) for plain, path in actual.items()}
    for path, sizes in about["layers"].items():
        module = modules.get(path)
        if module is None:
            raise ValueError(
                f"model has no layer {path}, which the checkpoint adapts{_made(about)}"
            )
        problem = why_not_alone(model, actual[path])
        if not isinstance(module, MoRAMLinear):
            problem = why_not_linear(module) or problem
        if problem:
            raise ValueError(f"layer {path} cannot be adapted: {problem}")
        for name in ("in_features", "out_features"):
            if getattr(module, name, None) != sizes[name]:
                raise ValueError(
                    f"layer {path} must have {name} {sizes[name]} for this checkpoint, got "
                    f"{getattr(module, name, None)}{_made(about)}"
                )
    for path, expected in about["fingerprint"].items():
        actual_samples = _samples(modules[path])
        if actual_samples is None:
            continue
        expected = torch.tensor(expected)
        # Five times what rounding to bfloat16 does. Written so that a NaN does not fit.
        limit = 0.02 * expected.abs().max()
        if not (actual_samples - expected).abs().max() <= limit:
            raise ValueError(
                f"layer {path} holds other weights than the model this checkpoint was trained on"
                f"{_made(about)}"
            )


def check_trained(model: nn.Module, about: Mapping[str, Any]) -> dict[str, tuple[nn.Module, str]]:
    """Where what was trained besides the adapters goes: {name: (module, its name there)}."""
    owners = plain_tensors(model)
    for name, shape in about.get("trained", {}).items():
        if name not in owners:
            raise ValueError(
                f"model has no tensor {name}, which was trained with the checkpoint{_made(about)}"
            )
        module, own = owners[name]
        present = getattr(module, own)
        if tuple(present.shape) != tuple(shape):
            raise ValueError(
                f"{name} must be {tuple(shape)}, as it was trained with the checkpoint, got "
                f"{tuple(present.shape)}; embeddings that were resized for it must be here, too "
                "(model.resize_token_embeddings)"
            )
        if present.is_meta:
            raise ValueError(
                f"{name} must have a value to be overwritten, got an offloaded one; load first, "
                "then offload"
            )
    return {name: owners[name] for name in about.get("trained", {})}


def _made(about: Mapping[str, Any]) -> str:
    name = about.get("base_model_name_or_path")
    return f" (made for {name})" if name else ""


def fingerprint(found: Mapping[str, MoRAMLinear]) -> dict[str, list[float]]:
    """A few base weights of the first and the last layer, to recognise the base model by."""
    ends = {path: found[path] for path in (next(iter(found)), [*found][-1])}
    # A base weight that was trained along is the checkpoint's own.
    frozen = {path: a for path, a in ends.items() if not a.weight.requires_grad}
    samples = {path: _samples(adapter) for path, adapter in frozen.items()}
    return {path: s.tolist() for path, s in samples.items() if s is not None}


def _samples(linear: nn.Module) -> Tensor | None:
    """Evenly spaced entries, or None where the stored weight is not the plain matrix."""
    weight = stored_weight(linear)
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain or weight.dim() != 2 or weight.is_meta:
        return None
    flat = weight.detach().reshape(-1)
    # An odd number of steps that shares no factor with usual widths, so that columns differ.
    picked = torch.arange(_SAMPLES) * max(1, flat.numel() // 67) % flat.numel()
    return flat[picked.to(flat.device)].float().cpu()
