"""Names of modules without what compiles, shards, checkpoints or adapts them. A leaf.

A checkpoint made of a wrapped model must load into the plain one, and the other way round.
"""

from collections.abc import Sequence
from typing import cast

from torch import nn

# The attribute that holds the wrapped module, by the wrapper's class.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
    "Adapter": "base_layer",
    "ModulesToSaveWrapper": "modules_to_save",
}
_PACKAGES = ("torch", "peft", "deepspeed", "moram")


def inner_name(module: nn.Module) -> str | None:
    """The path from a wrapper to what it wraps; None for any other module."""
    for kind in type(module).__mro__:
        if kind.__name__ in _INNER and kind.__module__.partition(".")[0] in _PACKAGES:
            name = _INNER[kind.__name__]
            if name == "modules_to_save":
                # A copy for each of PEFT's adapters.
                active = cast(Sequence[str], module.active_adapters)
                return f"{name}.{active[0]}" if active else "original_module"
            return name
    return None


def wrapping(model: nn.Module) -> list[nn.Module]:
    """The wrappers around the whole of a model, from outside, and the model inside them; adapters
    are not taken off."""
    found = [model]
    while (name := inner_name(found[-1])) not in (None, "base_layer"):
        found.append(found[-1].get_submodule(name))
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around the whole of it; adapters are not taken off."""
    return wrapping(model)[-1]


def plain_names(model: nn.Module) -> dict[str, str]:
    """The path of every module without wrappers, by its path with them, in the model's order."""
    names, wrappers = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        if not path:
            names[path] = ""
        elif path in wrappers:
            names[path] = names[wrappers[path]]
        else:
            names[path] = f"{names[parent]}.{name}".lstrip(".")
        inner = inner_name(module)
        if inner is not None:
            wrappers[f"{path}.{inner}".lstrip(".")] = path
    return names


def listed(paths: Sequence[str], most: int = 8) -> str:
    """The first of some paths, and how many more there are, for a message."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def plain_paths(model: nn.Module) -> dict[str, str]:
    """The inverse of `plain_names`: of a wrapper and what it wraps, the wrapper has the name."""
    found: dict[str, str] = {}
    for path, plain in plain_names(model).items():
        found.setdefault(plain, path)
    return found


def plain_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter and buffer is: {name without wrappers: (its module, its name there)}."""
    names = plain_names(model)
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name in (*module._parameters, *module._buffers):
            found.setdefault(f"{names[path]}.{name}".lstrip("."), (module, name))
    return found
