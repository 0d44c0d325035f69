"""Finds the projections that targets name, and says why one cannot be adapted. Changes nothing."""

import difflib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .layers import AdapterLinear
from .layers.base import offload_hooks, why_not_linear
from .models import PRESETS, TargetPreset, find_preset
from .models.open_clip import why_not_splittable
from .models.reads import why_read
from .wrappers import plain_paths, unwrapped


@dataclass(frozen=True)
class Found:
    """What `find_targets` found.

    matches: paths by target, in the order of the model; excluded: how many projections each of the
    caller's exclude names took out.
    """

    matches: dict[str, tuple[str, ...]]
    excluded: dict[str, int]


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> TargetPreset:
    """The `TargetPreset` for what `MoRAMConfig.targets` holds."""
    if not isinstance(targets, str):
        return TargetPreset(tuple(targets))
    name = find_preset(unwrapped(model)) if targets == "auto" else targets
    if name not in PRESETS:
        raise ValueError(
            f'targets must be "auto", a preset or a tuple of names, got {targets!r}; '
            f"presets: {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def why_refused(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a module cannot or must not be adapted, one sentence, or None."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.MultiheadAttention):
        problem = why_not_splittable(holder)
        if problem:
            return f"{parent} is an nn.MultiheadAttention that cannot be split: {problem}"
        return (
            f"{name} inside nn.MultiheadAttention is read, never called, so an adapter there would "
            "do nothing; use an open_clip preset or call moram.models.split_attention(model) first"
        )
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    if name == "lm_head" or (get_head is not None and get_head() is module):
        return "the output head is not adapted: fused losses read its weight and skip the module"
    return why_not_linear(module) or why_read(holder, name) or why_not_alone(model, path)


def find_targets(
    model: nn.Module,
    preset: TargetPreset,
    exclude: Iterable[str] = (),
    why_refused: Callable[[nn.Module, str, nn.Module], str | None] = why_refused,
) -> Found:
    """Paths of the Linears that each target of a preset names.

    Names are matched without the wrappers around modules (torch.compile, DataParallel and so on).

    Args:
        preset: `TargetPreset`. exclude: names and patterns like targets; what they name is left
            alone with all that is inside. why_refused: as the function of that name.
    Returns:
        `Found`.
    Raises:
        ValueError: a target or an exclude matches nothing, a target a module that cannot or must
            not be adapted, or the preset nothing in one of the model's towers.
    """
    actual = plain_paths(model)
    modules = {path: model.get_submodule(actual[path]) for path in actual if path}
    out = {pattern: {p for p in modules if is_inside(p, pattern)} for pattern in exclude}
    for pattern, inside in out.items():
        if not inside:
            raise ValueError(no_match("exclude", pattern, model, modules))
    gone = set().union(*out.values())
    gone |= {p for p in modules for pattern in preset.exclude if is_inside(p, pattern)}
    adapted = tuple(f"{p}." for p, m in modules.items() if isinstance(m, AdapterLinear))
    free = [path for path in modules if not path.startswith(adapted)]
    named = {t: [path for path in free if matches(path, t)] for t in preset.targets}
    found = {t: tuple(p for p in paths if p not in gone) for t, paths in named.items()}
    for target, paths in found.items():
        if not paths:
            left = {path: m for path, m in modules.items() if path not in gone}
            taken = len(named[target])
            hint = f"; exclude took out the {taken} that it names" if taken else ""
            raise ValueError(no_match("target", target, model, left) + hint)
        for path in paths:
            problem = why_refused(model, actual[path], modules[path])
            if problem:
                raise ValueError(f"target {target!r} matches {path}: {problem}")
    every = {path for paths in named.values() for path in paths}
    _check_towers(preset, modules, every, set(modules) - gone)
    return Found(
        {target: tuple(actual[path] for path in paths) for target, paths in found.items()},
        {pattern: len(every & inside) for pattern, inside in out.items()},
    )


def matches(path: str, name: str) -> bool:
    """Whether a name, a suffix of whole names or a pattern with *, means a path."""
    if "*" in name:
        return fnmatchcase(path, name)
    return path == name or path.endswith(f".{name}")


def is_inside(path: str, name: str) -> bool:
    """Whether a name means a path or one of the modules around it."""
    parts = path.split(".")
    return any(matches(".".join(parts[:end]), name) for end in range(1, len(parts) + 1))


def _check_towers(
    preset: TargetPreset,
    modules: Mapping[str, nn.Module],
    named: Iterable[str],
    present: Container[str],
) -> None:
    """Refuse to adapt one tower of two in silence.

    named: paths that targets mean, excluded or not; present: paths that nobody excluded.
    """
    for prefixes in preset.towers:
        inside = [path for path in modules if path.startswith(prefixes) and path in present]
        if inside and not any(path.startswith(prefixes) for path in named):
            tower = next(iter(inside)).partition(".")[0]
            raise ValueError(
                f"targets must match projections in every tower, got none in {tower} "
                f"({type(modules[tower]).__name__}), whose blocks this preset does not know; take "
                f'a preset for the other tower alone, name projections, or exclude "{tower}"'
            )


def no_match(what: str, name: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """That a name matches none of some modules of a model, and which names come closest.

    Args:
        what: the argument, such as "target" or "exclude". name: the one without a match.
        modules: of the model, by path, that it could have matched.
    """
    names = {
        path.rpartition(".")[2]
        for path, module in modules.items()
        if not what.startswith("target")
        or why_not_linear(module) is None
        or "Conv1D" in type(module).__name__
    }
    close = difflib.get_close_matches(name.rpartition(".")[2], sorted(names), n=3, cutoff=0.4)
    if not close:
        close = sorted(names)[:8]
    packed = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    hint = (
        "; the model has nn.MultiheadAttention, whose projections are packed: use an open_clip "
        "preset or call moram.models.split_attention(model) first"
        if packed and name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
        else ""
    )
    return (
        f"{what} {name!r} matches no module of {type(model).__name__}; "
        f"closest names: {', '.join(close) or 'the model has no Linear'}{hint}"
    )


def why_not_alone(model: nn.Module, path: str) -> str | None:
    """Why a module's weights do not move without those around it, one sentence, or None."""
    parts = path.split(".")
    for end in range(len(parts)):
        around = ".".join(parts[:end])
        if any(hook.place_submodules for hook in offload_hooks(model.get_submodule(around))):
            return (
                f"accelerate offloads {around or 'the model'} as a whole, and would look for the "
                "atoms among its stored weights; offload without preload_module_classes"
            )
    return None
