"""Adapters on disk, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

The safetensors header holds the whole description too, and is what `load` reads: one file, replaced
in one step, so a crash leaves either the old checkpoint or the new one. Saving changes nothing in
the model; loading checks everything before it changes anything.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import MoRAMConfig
from .inject import adapters, restore, wrap_paths
from .layers import MoRAMLinear
from .layers.base import why_not_linear
from .models import split_attention

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = 1
_PARTS = ("frozen_keys", "frozen_values", "current_keys", "current_values")
_SAMPLES = 64


def save(model, directory, *, tasks=(), base_model=None):
    """Write the adapters of a model; the model is not changed.

    Args:
        model: a model after `inject`.
        directory: made if missing. A checkpoint in it is replaced in one step.
        tasks: names of the tasks learned so far, in order.
        base_model: name or path of the base; by default what the model's config says.
    Raises:
        ValueError: the model has no adapters, or they differ in their settings.
        TypeError: tasks is one text.
    """
    model = _unwrap(model)
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters to save; call moram.inject first")
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, got the text {tasks!r}")
    configs = {adapter.config for adapter in found.values()}
    if len(configs) > 1:
        raise ValueError("adapters must share one config to be saved together")
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    tensors, layers = {}, {}
    for path, adapter in found.items():
        state = adapter.bank.state_dict()
        # Guarded keys are saved as they act: what is loaded answers as this model does.
        state["current_keys"] = adapter.bank.acting_keys()
        for part in _PARTS:
            tensors[_tensor_name(path, part)] = state[part].detach().cpu().contiguous()
        layers[path] = {
            "in_features": adapter.in_features,
            "out_features": adapter.out_features,
            "frozen": adapter.bank.num_frozen,
            "current": adapter.bank.num_current,
        }
    about = {
        "peft_type": "MORAM",
        "format": FORMAT,
        "base_model_name_or_path": base_model,
        "tasks": list(tasks),
        "settings": next(iter(configs)).to_dict(),
        "layers": layers,
        "fingerprint": _fingerprint(found),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights_tmp, config_tmp = directory / f".{WEIGHTS}.tmp", directory / f".{CONFIG}.tmp"
    try:
        save_file(tensors, weights_tmp, metadata={"format": "pt", "moram": json.dumps(about)})
        config_tmp.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for path in (weights_tmp, config_tmp):
            _flush(path)
        os.replace(weights_tmp, directory / WEIGHTS)
        os.replace(config_tmp, directory / CONFIG)
    finally:
        weights_tmp.unlink(missing_ok=True)
        config_tmp.unlink(missing_ok=True)


def load(model, directory, *, generator=None):
    """Put saved adapters into a model, injecting them first if it has none.

    Args:
        model: the base model, or one with adapters on the same projections.
        directory: what `save` wrote.
    Returns:
        The description: settings, tasks, layers, base_model_name_or_path.
    Raises:
        FileNotFoundError: there is no checkpoint in directory.
        ValueError: the file is damaged or foreign, or does not fit the model; the message says
            which layer and which size. The model is left untouched.
    """
    model = _unwrap(model)
    about, tensors, config = _read(Path(directory) / WEIGHTS)
    packed = dict(model.named_modules(remove_duplicate=False))
    try:
        _split_like(model, about["layers"])
        _check_fit(model, about)
        if not adapters(model):
            wrap_paths(
                model,
                tuple(about["layers"]),
                lambda linear: MoRAMLinear.from_linear(linear, config, generator=generator),
            )
    except BaseException:
        restore(model, packed)
        raise
    for path, adapter in adapters(model).items():
        adapter.configure(config)
        adapter.bank.to(getattr(torch, config.atom_dtype))
        adapter.bank.load_state_dict({part: tensors[_tensor_name(path, part)] for part in _PARTS})
    return about


def _unwrap(model):
    """The model inside DistributedDataParallel or torch.compile, whose paths are its own."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _tensor_name(path, part):
    return f"base_model.model.{path}.moram_{part}"


def _flush(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"directory holds no MoRAM checkpoint: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if "moram" not in header:
        raise ValueError(f"{path} was not written by moram.save (its header has no 'moram' entry)")
    try:
        about = json.loads(header["moram"])
        if about.get("format") != FORMAT:
            raise ValueError(f"it has format {about.get('format')!r}, this version reads {FORMAT}")
        _check_tensors(about["layers"], tensors)
        config = MoRAMConfig.from_dict(about["settings"])
        if not about["fingerprint"].keys() <= about["layers"].keys():
            raise ValueError("its fingerprint names layers that it does not hold")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        kind = type(error).__name__
        detail = error if isinstance(error, ValueError) else f"its description lacks sense ({kind})"
        raise ValueError(f"{path} cannot be loaded: {detail}") from error
    return about, tensors, config


def _check_tensors(layers, tensors):
    for layer, sizes in layers.items():
        widths = {"keys": sizes["in_features"], "values": sizes["out_features"]}
        for part in _PARTS:
            rows, kind = part.split("_")
            name, shape = _tensor_name(layer, part), (sizes[rows], widths[kind])
            if name not in tensors:
                raise ValueError(f"it lacks {name}")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(tensors[name].shape)}")


def _split_like(model, layers):
    """Split the packed attention whose projections the checkpoint adapts."""
    packed = {path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    wanted = {layer.rpartition(".")[0] for layer in layers}
    if packed & wanted:
        split_attention(model, tuple(packed & wanted))


def _check_fit(model, about):
    present, wanted = adapters(model), about["layers"]
    if present and set(present) != set(wanted):
        odd = sorted(set(present) ^ set(wanted))
        raise ValueError(
            f"model and checkpoint adapt different projections, for example {odd[0]}; "
            "load into the plain base model"
        )
    modules = dict(model.named_modules())
    for path, sizes in wanted.items():
        module = modules.get(path)
        if module is None:
            raise ValueError(
                f"model has no layer {path}, which the checkpoint adapts{_made(about)}"
            )
        problem = None if isinstance(module, MoRAMLinear) else why_not_linear(module)
        if problem:
            raise ValueError(f"layer {path} cannot be adapted: {problem}")
        for name in ("in_features", "out_features"):
            if getattr(module, name, None) != sizes[name]:
                raise ValueError(
                    f"layer {path} must have {name} {sizes[name]} for this checkpoint, got "
                    f"{getattr(module, name, None)}{_made(about)}"
                )
    bases = {path: modules[path] for path in wanted}
    for path, expected in about["fingerprint"].items():
        actual = _samples(bases[path].weight)
        if actual is None:
            continue
        expected = torch.tensor(expected)
        # Five times what rounding to bfloat16 does.
        if (actual - expected).abs().max() > 0.02 * expected.abs().max():
            raise ValueError(
                f"layer {path} holds other weights than the model this checkpoint was trained on"
                f"{_made(about)}"
            )


def _made(about):
    name = about.get("base_model_name_or_path")
    return f" (made for {name})" if name else ""


def _fingerprint(found):
    """A few base weights of the first and the last layer, to recognise the base model by."""
    ends = {path: found[path] for path in (next(iter(found)), next(reversed(found)))}
    samples = {path: _samples(adapter.weight) for path, adapter in ends.items()}
    return {path: s.tolist() for path, s in samples.items() if s is not None}


def _samples(weight):
    """Evenly spaced entries, or None where the stored weight is not the plain matrix."""
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain or weight.dim() != 2 or weight.is_meta:
        return None
    flat = weight.detach().reshape(-1)
    # An odd number of steps that shares no factor with usual widths, so that columns differ.
    picked = torch.arange(_SAMPLES) * max(1, flat.numel() // 67) % flat.numel()
    return flat[picked.to(flat.device)].float().cpu()
