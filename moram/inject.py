"""Puts adapters around the targets of a model, takes them out again, and grows their banks."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import nn

from .beside import note_beside
from .config import MoRAMConfig
from .draw import changes_parameters
from .layers import Adapter, AdapterLinear, MoRAMLinear
from .layers.shared import SharedInput
from .models import split_attention
from .models.heads import fresh_heads
from .models.open_clip import settle_encoders
from .models.quantised import keep_unpacked
from .optimizers import watch
from .replicas import watch_replicas
from .sharded import reshard
from .targets import find_targets, resolve_targets
from .wrappers import listed, unwrapped

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did.

    matches: projections by target; paths: of the adapted modules; num_trainable: parameters;
    excluded: projections by exclude; fresh: paths of frozen heads that look freshly initialised.
    """

    matches: dict[str, int]
    paths: tuple[str, ...]
    num_trainable: int
    excluded: dict[str, int]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.paths)} projections adapted ({_counts(self.matches)})"
        if self.excluded:
            text += f", excluded {_counts(self.excluded)}"
        if self.fresh:
            text += f", frozen though freshly initialised {', '.join(self.fresh)}"
        return f"{text}, {self.num_trainable:,} trainable"


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in numbers.items())


# Projections of one block that read the same tensor.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def inject(
    model: nn.Module,
    config: MoRAMConfig | None = None,
    *,
    share_inputs: bool = False,
    generator: torch.Generator | None = None,
) -> InjectReport:
    """Put a `MoRAMLinear` around every target of the model, in place, and freeze all the rest.

    open_clip attention is split first. Only the atoms of the current task stay trainable. A head
    that looks freshly initialised is frozen, too, with a warning: unfreeze it to train it, and
    `save` keeps it.

    Args:
        model: any `nn.Module`.
        config: `MoRAMConfig`.
        share_inputs: let q/k/v, and gate/up, score their banks together where the Triton backend's
            cost model says that it pays. The numbers stay the same.
        generator: for the initial keys.
    Returns:
        `InjectReport`.
    Raises:
        ValueError: a target or an exclude matches nothing, a target something that must not be
            adapted, or a preset nothing in one tower of two; the model is left untouched.
    """
    config = MoRAMConfig() if config is None else config
    if not isinstance(config, MoRAMConfig):
        raise TypeError(f"config must be a MoRAMConfig, got {type(config).__name__}")

    def wrap(linear: nn.Module) -> MoRAMLinear:
        return MoRAMLinear.from_linear(linear, config, generator=generator)

    report = inject_with(model, config.targets, config.exclude, wrap)
    if share_inputs:
        _share_inputs(model)
    return report


def _share_inputs(model: nn.Module) -> None:
    for module in model.modules():
        for names in SHARED_INPUTS:
            layers = [getattr(module, name, None) for name in names]
            layers = [layer for layer in layers if isinstance(layer, MoRAMLinear)]
            if len(layers) > 1:
                group = SharedInput(layers)
                for layer in layers:
                    layer.shared = group


@changes_parameters
def inject_with(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: Iterable[str],
    wrap: Callable[[nn.Module], Adapter],
) -> InjectReport:
    """`inject` for any kind of adapter.

    Args:
        model: any `nn.Module`. targets, exclude: as in `MoRAMConfig`.
        wrap: function from a Linear to the `AdapterLinear` to use in its place.
    Returns, Raises: as `inject`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    preset = resolve_targets(model, targets)
    packed = dict(model.named_modules(remove_duplicate=False))
    try:
        if preset.split:
            split_attention(unwrapped(model), preset.split)
        found = find_targets(model, preset, tuple(exclude))
        firsts: dict[int, str] = {}
        for paths in found.matches.values():
            for path in paths:
                firsts.setdefault(id(model.get_submodule(path)), path)
        paths = tuple(firsts.values())
        fresh = fresh_heads(unwrapped(model), [model.get_submodule(path) for path in paths])
        wrap_paths(model, paths, wrap)
    except BaseException:
        restore(model, packed)
        raise
    if fresh:
        warnings.warn(
            f"inject froze what looks freshly initialised: {', '.join(fresh)}; to train it, call "
            "requires_grad_(True) on it after inject",
            stacklevel=3,
        )
    return InjectReport(
        {name: len(paths) for name, paths in found.matches.items()},
        paths,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        found.excluded,
        fresh,
    )


def restore(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put back the packed attention of `modules`, a dict of the model's earlier modules by path."""
    for path, module in modules.items():
        if path and isinstance(module, nn.MultiheadAttention):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
    settle_encoders(model)


def wrap_paths(
    model: nn.Module, paths: Iterable[str], wrap: Callable[[nn.Module], Adapter]
) -> None:
    """Replace the modules at the paths by wrap(module), wherever used, and freeze the rest."""
    adapted = any(isinstance(m, Adapter) for m in model.modules())
    trainable = [p for p in model.parameters() if p.requires_grad]
    names: dict[int, list[str]] = {}
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
    # What is trainable beside adapters of an earlier injection is so by choice.
    wrappers = [adapter for _, adapter in wrapped]
    bases = {id(p) for adapter in wrappers for p in adapter.base_layer.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(adapted and id(parameter) not in bases)
    for uses, adapter in wrapped:
        for use in uses:
            parent, _, name = use.rpartition(".")
            setattr(model.get_submodule(parent), name, adapter)
    keep_unpacked(model)
    watch_replicas(model)
    # Only from here on can all of them have been called.
    for adapter in adapters(model, Adapter).values():
        adapter.calls.seen = False


def eject(model: nn.Module) -> tuple[str, ...]:
    """Take all adapters out, leaving the base Linears, in place. Returns the paths.

    Base parameters stay frozen; split open_clip attention stays split (`pack_attention` undoes it).
    """
    paths = []
    if isinstance(model, AdapterLinear):
        raise ValueError(f"model must hold adapters, got a {type(model).__name__} itself")
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdapterLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base_layer)
            paths.append(path)
    return tuple(paths)


@overload
def adapters(model: nn.Module) -> dict[str, MoRAMLinear]: ...
@overload
def adapters(model: nn.Module, kind: type[M]) -> dict[str, M]: ...
def adapters(model: nn.Module, kind: type[nn.Module] = MoRAMLinear) -> dict[str, Any]:
    """The adapters of a model by path, in the order of the model: `MoRAMLinear`s, or another kind
    of `AdapterLinear`. Of PEFT's adapters they are the active one's, disabled or not."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, kind)}
    return {path: m for path, m in found.items() if getattr(m, "has_bank", True)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable atoms of all adapters: what an optimiser of the current task gets."""
    return [p for adapter in adapters(model).values() for p in adapter.bank.parameters()]


def grow(
    model: nn.Module, n: int | None = None, *, generator: torch.Generator | None = None
) -> list[nn.Parameter]:
    """Start a new task: freeze the current atoms of every adapter and append fresh ones.

    An optimiser from before trains nothing, or moves the new atoms by the old ones' moments: its
    next step raises or warns. An adapter that no call reached while others were is reported.

    Args:
        n: atoms to append to each; by default what each adapter's config says.
        generator: for the new keys.
    Returns:
        The parameters to train, for a fresh optimiser: those of `moram.parameters(model)`.
    Raises:
        ValueError: the model has no adapters.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model has no MoRAM adapters; call moram.inject(model, config) first")
    warn_uncalled(model)
    grow_banks(model, found, n, generator)
    return parameters(model)


def grow_banks(
    model: nn.Module,
    found: Mapping[str, MoRAMLinear],
    n: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """`grow` for some of a model's adapters.

    Args:
        found: these adapters, by path. n, generator: as for `grow`.
    """
    reshard(model)
    note_beside(model)

    def change() -> None:
        for adapter in found.values():
            adapter.bank.grow(adapter.config.atoms_per_task if n is None else n, generator)

    watch(lambda: parameters(model), change)
    watch_replicas(model)


def uncalled(model: nn.Module) -> tuple[str, ...]:
    """Paths of the adapters that no forward pass called, if there was one; else empty.

    That there was one shows in another adapter, or in the gradient of a parameter beside them.
    """
    found = adapters(model, Adapter)
    missed = tuple(path for path, adapter in found.items() if not adapter.calls.seen)
    if len(missed) < len(found):
        return missed
    return missed if any(p.grad is not None for p in model.parameters()) else ()


def warn_uncalled(model: nn.Module) -> None:
    """Warn, by path, of adapters that learn and change nothing because nothing calls them."""
    missed = uncalled(model)
    if missed:
        warnings.warn(
            "no call reached these adapters although the model was called, so they learn and "
            f"change nothing: {listed(missed)}; if the model reads their weight instead, "
            "leave them out with exclude",
            stacklevel=3,
        )
