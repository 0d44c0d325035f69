"""Which layers of a model a PEFT config means: strictly, so that nothing is left out in silence."""

import copy
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ..models import PRESETS, split_attention
from ..targets import find_targets, no_match, resolve_targets, why_refused
from ..wrappers import plain_names, unwrapped
from .config import HEADS, MoRAMPeftConfig
from .layer import MoRAMTunerLinear

Modules = dict[str, nn.Module]


def choose(model: nn.Module, config: MoRAMPeftConfig) -> dict[str, int]:
    """Settle config.target_modules, and say how many layers each of its names takes.

    The packed attention of open_clip is split for the presets that name its projections.

    Raises:
        ValueError: a name, a pattern or an index matches nothing, or a layer cannot be adapted.
    """
    targets = "auto" if config.target_modules is None else config.target_modules
    if not targets:
        raise ValueError(
            "target_modules must name a projection, got none; None means those that the model's "
            "family adapts"
        )
    if isinstance(targets, str) and (targets == "auto" or targets in PRESETS):
        try:
            counts = _take_preset(model, config, targets)
        except ValueError as error:
            raise ValueError(f"target_modules {config.target_modules!r}: {error}") from None
        modules, taken = _planned(model, config)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        modules, taken = _planned(model, config)
        free = (path for path, module in taken.items() if _why_refused(model, path, module) is None)
        taken = {path: taken[path] for path in _in_blocks(config, free)}
        config.target_modules = set(taken)  # type: ignore[assignment]
        counts = {"all-linear": len(taken)}
    elif isinstance(targets, str):
        modules, taken = _planned(model, config)
        if config.layers_to_transform is not None:
            taken = {path: taken[path] for path in _in_blocks(config, taken)}
            config.target_modules = set(taken)  # type: ignore[assignment]
        counts = {targets: len(taken)}
    else:
        modules, taken = _planned(model, config)
        counts = {name: sum(_ends(path, name) for path in taken) for name in sorted(targets)}
    excluded = config.exclude_modules or ()
    for name in (excluded,) if isinstance(excluded, str) else sorted(excluded):
        if not any(_means(path, name, isinstance(excluded, str)) for path in modules):
            raise ValueError(no_match("exclude_modules", name, model, modules))
    # PEFT adds these, whether the model has them or not.
    heads = HEADS.get(config.task_type or "", ())
    for name in sorted(set(config.modules_to_save or ()) - set(heads)):
        if not any(path.endswith(name) for path in modules):
            raise ValueError(no_match("modules_to_save", name, model, modules))
    for name, count in counts.items():
        if not count:
            raise ValueError(_why_none(model, config, name, name == targets, modules))
    for path, module in taken.items():
        problem = _why_refused(model, path, module)
        if problem:
            raise ValueError(f"target_modules match {path}: {problem}")
    _check_parts(model, config, taken)
    return counts


def _take_preset(model: nn.Module, config: MoRAMPeftConfig, name: str) -> dict[str, int]:
    """Write out the layers of a preset that the other fields of the config leave."""
    preset = resolve_targets(model, name)
    if preset.split:
        split_attention(unwrapped(model), preset.split)
    found = find_targets(model, preset, (), _why_refused)
    paths = _in_blocks(config, (path for taken in found.matches.values() for path in taken))
    config.target_modules = set(paths)  # type: ignore[assignment]
    return {t: sum(path in paths for path in taken) for t, taken in found.matches.items()}


def _in_blocks(config: MoRAMPeftConfig, paths: Iterable[str]) -> list[str]:
    """Those of some paths that the fields of a config other than target_modules leave."""
    paths, probe = list(paths), copy.copy(config)
    # PEFT asks for the index of a block only where a name is not the whole path.
    probe.target_modules = {path.rpartition(".")[2] for path in paths}  # type: ignore[assignment]
    return [path for path in paths if check_target_module_exists(probe, path)]


def _planned(model: nn.Module, config: MoRAMPeftConfig) -> tuple[Modules, Modules]:
    """The modules of the model outside of adapters, and those that PEFT will adapt, by path."""
    every = {path: module for path, module in model.named_modules() if path}
    inside = tuple(f"{p}." for p, m in every.items() if isinstance(m, MoRAMTunerLinear))
    modules = {path: m for path, m in every.items() if not path.startswith(inside)}
    taken = {p: m for p, m in modules.items() if check_target_module_exists(config, p)}
    return modules, taken


def _why_refused(model: nn.Module, path: str, module: nn.Module) -> str | None:
    if isinstance(module, MoRAMTunerLinear):
        return None
    if type(module).__module__.startswith("peft.tuners"):
        return "another PEFT method adapts it already; use one method, or moram.inject beside it"
    return why_refused(model, path, module)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _means(path: str, name: str, is_expression: bool) -> bool:
    return bool(re.fullmatch(name, path)) if is_expression else _ends(path, name)


def _why_none(
    model: nn.Module, config: MoRAMPeftConfig, name: str, is_expression: bool, modules: Modules
) -> str:
    without: Any = copy.copy(config)
    without.exclude_modules = without.layers_to_transform = without.modules_to_save = None
    without.target_modules = name if is_expression else [name]
    if name == "all-linear" or any(check_target_module_exists(without, path) for path in modules):
        return (
            f"target_modules {name!r} names modules, but exclude_modules, layers_to_transform or "
            "modules_to_save leave none of them; leave the name out, too"
        )
    return no_match("target_modules", name, model, modules)


def _check_parts(model: nn.Module, config: MoRAMPeftConfig, taken: Modules) -> None:
    """Raise where an index or a pattern of the config means none of the layers to adapt."""
    plain = plain_names(model)
    indices = config.layers_to_transform
    if config.layers_pattern and indices is None:
        raise ValueError(
            "layers_pattern must come with layers_to_transform, whose blocks it finds, got "
            f"{config.layers_pattern!r} alone"
        )
    for index in [indices] if isinstance(indices, int) else indices or ():
        probe = copy.copy(config)
        probe.layers_to_transform = [index]
        if not _in_blocks(probe, taken):
            raise ValueError(
                f"layers_to_transform must be indices of blocks with a target, got {index}"
            )
    for pattern in config.atoms_pattern:
        if not any(get_pattern_key([pattern], plain[path]) == pattern for path in taken):
            raise ValueError(
                f"atoms_pattern {pattern!r} matches none of the {len(taken)} layers to adapt"
            )
