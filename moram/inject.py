"""Puts adapters around the targets of a model, takes them out again, and grows their banks."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .config import MoRAMConfig
from .layers import AdapterLinear, MoRAMLinear
from .layers.base import why_not_linear
from .layers.shared import SharedInput
from .models import PRESETS, TargetPreset, find_preset, split_attention
from .models.open_clip import why_not_splittable


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did: matches per target name, adapted paths, trainable parameters."""

    matches: dict[str, int]
    paths: tuple[str, ...]
    num_trainable: int

    def __str__(self):
        counts = ", ".join(f"{name} {count}" for name, count in self.matches.items())
        return f"{len(self.paths)} projections adapted ({counts}), {self.num_trainable:,} trainable"


# Projections of one block that read the same tensor.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def inject(model, config=None, *, share_inputs=False, generator=None):
    """Put a `MoRAMLinear` around every target of the model, in place, and freeze all the rest.

    open_clip attention is split first. Only the atoms of the current task stay trainable.

    Args:
        model: any `nn.Module`.
        config: `MoRAMConfig`.
        share_inputs: let q/k/v, and gate/up, score their banks together where the Triton backend's
            cost model says that it pays. The numbers stay the same.
        generator: for the initial keys.
    Returns:
        `InjectReport`.
    Raises:
        ValueError: a target matches nothing, or something that must not be adapted; the model is
            left untouched.
    """
    config = MoRAMConfig() if config is None else config
    if not isinstance(config, MoRAMConfig):
        raise TypeError(f"config must be a MoRAMConfig, got {type(config).__name__}")

    def wrap(linear):
        return MoRAMLinear.from_linear(linear, config, generator=generator)

    report = inject_with(model, config.targets, config.exclude, wrap)
    if share_inputs:
        _share_inputs(model)
    return report


def _share_inputs(model):
    for module in model.modules():
        for names in SHARED_INPUTS:
            layers = [getattr(module, name, None) for name in names]
            layers = [layer for layer in layers if isinstance(layer, MoRAMLinear)]
            if len(layers) > 1:
                group = SharedInput(layers)
                for layer in layers:
                    layer.shared = group


def inject_with(model, targets, exclude, wrap):
    """`inject` for any kind of adapter: wrap(linear) returns the `AdapterLinear` to use."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    preset = resolve_targets(model, targets)
    packed = dict(model.named_modules(remove_duplicate=False))
    try:
        if preset.split:
            split_attention(model, preset.split)
        found = find_targets(model, preset.targets, preset.exclude + tuple(exclude))
        firsts = {}
        for paths in found.values():
            for path in paths:
                firsts.setdefault(id(model.get_submodule(path)), path)
        paths = tuple(firsts.values())
        wrap_paths(model, paths, wrap)
    except BaseException:
        restore(model, packed)
        raise
    return InjectReport(
        {name: len(paths) for name, paths in found.items()},
        paths,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def restore(model, modules):
    """Put back the packed attention of `modules`, a dict of the model's earlier modules by path."""
    for path, module in modules.items():
        if path and isinstance(module, nn.MultiheadAttention):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)


def resolve_targets(model, targets):
    """The `TargetPreset` for what `MoRAMConfig.targets` holds."""
    if not isinstance(targets, str):
        return TargetPreset(tuple(targets))
    name = find_preset(model) if targets == "auto" else targets
    if name not in PRESETS:
        raise ValueError(
            f'targets must be "auto", a preset or a tuple of names, got {targets!r}; '
            f"presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def find_targets(model, targets, exclude=()):
    """Paths of the Linears that each target names.

    Returns:
        A dict from target to a tuple of paths, in the order of the model.
    Raises:
        ValueError: a target matches nothing, or a module that cannot or must not be adapted.
    """
    modules = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not any(fnmatchcase(path, pattern) for pattern in exclude)
    }
    inside = [path for path, module in modules.items() if isinstance(module, AdapterLinear)]
    found = {
        target: tuple(
            path
            for path in modules
            if _matches(path, target) and not path.startswith(tuple(f"{p}." for p in inside))
        )
        for target in targets
    }
    for target, paths in found.items():
        if not paths:
            raise ValueError(_no_match(target, model, modules))
        for path in paths:
            problem = _why_refused(model, path, modules[path])
            if problem:
                raise ValueError(f"target {target!r} matches {path}: {problem}")
    return found


def _matches(path, target):
    if "*" in target:
        return fnmatchcase(path, target)
    return path == target or path.endswith(f".{target}")


def _no_match(target, model, modules):
    names = {
        path.rpartition(".")[2]
        for path, module in modules.items()
        if why_not_linear(module) is None or "Conv1D" in type(module).__name__
    }
    close = difflib.get_close_matches(target.rpartition(".")[2], sorted(names), n=3, cutoff=0.4)
    if not close:
        close = sorted(names)[:8]
    packed = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    hint = (
        "; the model has nn.MultiheadAttention, whose projections are packed: use an open_clip "
        "preset or call moram.models.split_attention(model) first"
        if packed and target.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
        else ""
    )
    return (
        f"target {target!r} matches no module of {type(model).__name__}; "
        f"closest names: {', '.join(close) or 'the model has no Linear'}{hint}"
    )


def _why_refused(model, path, module):
    parent, _, name = path.rpartition(".")
    attention = model.get_submodule(parent)
    if isinstance(attention, nn.MultiheadAttention):
        problem = why_not_splittable(attention)
        if problem:
            return f"{parent} is an nn.MultiheadAttention that cannot be split: {problem}"
        return (
            f"{name} inside nn.MultiheadAttention is read, never called, so an adapter there would "
            "do nothing; use an open_clip preset or call moram.models.split_attention(model) first"
        )
    get_head = getattr(model, "get_output_embeddings", None)
    if name == "lm_head" or (get_head is not None and get_head() is module):
        return "the output head is not adapted: fused losses read its weight and skip the module"
    return why_not_linear(module)


def wrap_paths(model, paths, wrap):
    """Replace the modules at the paths by wrap(module), wherever used, and freeze the rest."""
    present = [m for m in model.modules() if isinstance(m, AdapterLinear)]
    kept = {id(p) for adapter in present for p in adapter.parameters() if p.requires_grad}
    trainable = [p for p in model.parameters() if p.requires_grad]
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    wrapped = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            wrapped.append((names[id(module)], wrap(module).train(module.training)))
    except BaseException:
        # Wrapping freezes what it wraps.
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for parameter in trainable:
        parameter.requires_grad_(id(parameter) in kept)
    for uses, adapter in wrapped:
        for use in uses:
            parent, _, name = use.rpartition(".")
            setattr(model.get_submodule(parent), name, adapter)


def eject(model):
    """Take all adapters out, leaving the base Linears, in place. Returns the paths.

    Base parameters stay frozen; split open_clip attention stays split (`pack_attention` undoes it).
    """
    paths = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdapterLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base_layer)
            paths.append(path)
    return tuple(paths)


def adapters(model, kind=MoRAMLinear):
    """The adapters of a model by path, in the order of the model: `MoRAMLinear`s, or another kind
    of `AdapterLinear`."""
    return {path: m for path, m in model.named_modules() if isinstance(m, kind)}


def grow(model, n=None, *, generator=None):
    """Start a new task: freeze the current atoms of every adapter and append fresh ones.

    Args:
        n: atoms to append to each; by default what each adapter's config says.
        generator: for the new keys.
    Raises:
        ValueError: the model has no adapters.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters; call moram.inject(model, config) first")
    for adapter in found.values():
        adapter.bank.grow(adapter.config.atoms_per_task if n is None else n, generator)
