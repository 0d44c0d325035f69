"""PEFT's tuner: puts banks where a config says, checks first, and refuses in plain words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..beside import has_other_adapters
from ..checkpoint import split_like
from ..fit import check_layers, fingerprint
from ..inject import restore
from ..models.quantised import keep_unpacked
from ..replicas import watch_replicas
from ..stored import PREFIX
from ..wrappers import listed, plain_names, plain_paths
from .config import MoRAMPeftConfig
from .layer import NO_MERGE, MoRAMTunerLinear
from .matching import choose


class MoRAMTuner(BaseTuner):
    """What `get_peft_model` puts around a model, and `inject_adapter_in_model` uses.

    `matches`: how many layers each name in the last config's target_modules took.
    """

    prefix: str = "moram_"
    tuner_layer_cls = MoRAMTunerLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter. The model is left as it was where that raises.

        Args: as for PEFT's `BaseTuner.inject_adapter`.

        Raises:
            ValueError: the name cannot be one of an adapter, a name in the config matches nothing,
                a target cannot be adapted, or the config's files do not fit the model.
        """
        problem = _why_not_name(model, adapter_name)
        if problem:
            raise ValueError(f"adapter_name must be another, got {adapter_name!r}: {problem}")
        config = self.peft_config[adapter_name]
        assert isinstance(config, MoRAMPeftConfig)
        config = config.taken()
        self.peft_config[adapter_name] = config
        before = dict(model.named_modules(remove_duplicate=False))
        trainable = {p: p.requires_grad for p in model.parameters()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for path, layer in _layers(model, adapter_name).items():
                layer.delete_adapter(adapter_name)
                if before.get(path) is not layer:
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, layer.base_layer)
            restore(model, before)
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)
            raise
        names = plain_names(model)
        layers = {names[path]: layer for path, layer in _layers(model, adapter_name).items()}
        for path, layer in layers.items():
            known = config.protection[path]
            for what, of in (("sketch", "of"), ("guard", "guard_of")):
                if known.get(of, path) != path:
                    lender = layers[known[of]].bank_of(adapter_name)
                    layer.bank_of(adapter_name).lenders[what] = lender
        keep_unpacked(model)
        watch_replicas(model)
        config.fingerprint = config.fingerprint or fingerprint(layers)

    def _prepare_adapter_config(
        self, peft_config: MoRAMPeftConfig, model_config: dict[str, Any]
    ) -> MoRAMPeftConfig:
        # `_prepare_model`, which has the model, does it.
        return peft_config

    def _prepare_model(self, peft_config: MoRAMPeftConfig, model: nn.Module) -> None:
        if peft_config.layers:
            self.matches: dict[str, int] = _choose_saved(model, peft_config)
        else:
            self.matches = choose(model, peft_config)
        self._plain_names = plain_names(model)

    def _create_and_replace(
        self,
        peft_config: MoRAMPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, MoRAMTunerLinear):
            layer = MoRAMTunerLinear(target, adapter_name).train(target.training)
            self._replace_module(parent, target_name, layer, target)
        # PEFT finds layers by a state dict's names without the wrapper of a compiled model.
        key = current_key if current_key in self._plain_names else f"_orig_mod.{current_key}"
        layer.add_bank(adapter_name, peft_config, self._plain_names[key])

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # A bank is made where its layer computes, which PEFT would take an offloaded one away from.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: the config's atom_dtype says what atoms are."""

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(NO_MERGE)

    def unmerge_adapter(self) -> NoReturn:
        """Raise NotImplementedError, as nothing was merged."""
        raise NotImplementedError(NO_MERGE)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError: there is no sum of adapters."""
        raise NotImplementedError(
            "MoRAM adapters cannot be added up: which atoms fire depends on all of a bank's; learn "
            "the tasks one after the other in one adapter (moram.task)"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT takes the argument away from the call without a word.
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "adapter_names: a batch cannot mix MoRAM adapters; call the model for each adapter "
                "by itself, after set_adapter"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: MoRAMPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        # What protection knows may have no place in the model yet, where PEFT would look for it.
        prefix = "" if isinstance(model, PeftModel) else PREFIX
        part, own = ".moram_bank.", f".moram_bank.{adapter_name}."
        return {k.removeprefix(prefix).replace(part, own): t for k, t in state_dict.items()}


def _layers(model: nn.Module, adapter_name: str) -> dict[str, MoRAMTunerLinear]:
    """The layers that an adapter has a bank in, by path, the model's own order."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, MoRAMTunerLinear)}
    return {path: layer for path, layer in found.items() if adapter_name in layer.moram_bank}


def _choose_saved(model: nn.Module, config: MoRAMPeftConfig) -> dict[str, int]:
    """Take the layers that an adapter's files hold; raise where they do not fit the model."""
    if config.other_adapters and not has_other_adapters(model):
        raise ValueError(
            "model must hold the PEFT adapter beside which this one was trained; PEFT cannot put "
            "two methods into one model: load that one, then this one by moram.load"
        )
    whole = set(config.modules_to_save or ())
    left = [name for name in config.trained or () if name.rpartition(".")[0] not in whole]
    if left:
        raise ValueError(
            f"PEFT cannot load {listed(left)}, which was trained with this adapter: it takes whole "
            "modules alone; use moram.load(model, directory)"
        )
    split_like(model, config.layers)
    check_layers(model, vars(config))
    actual = plain_paths(model)
    paths = {actual[path] for path in config.layers}
    config.target_modules = paths  # type: ignore[assignment]
    config.exclude_modules = config.layers_to_transform = None
    return dict.fromkeys(config.layers, 1)


def _why_not_name(model: nn.Module, name: str) -> str | None:
    """Why PEFT would mix up an adapter of this name with something else, or None."""
    if not name or "." in name:
        return "it must have letters and no dot, because it becomes part of tensors' names"
    if name in "moram_bank":
        return "it is part of 'moram_bank', by which PEFT knows the tensors of MoRAM"
    if hasattr(nn.ModuleDict(), name):
        return "torch's ModuleDict, which holds the banks, has an attribute of that name"
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    for module in model.modules():
        if isinstance(module, MoRAMTunerLinear):
            if name in module.moram_bank:
                return (
                    "the model has an adapter of that name, whose atoms would be lost; take that "
                    "one out with delete_adapter or unload() first"
                )
            parts -= set(module.moram_bank)
    if name in parts:
        return "a module of the model has that name, and PEFT would leave its tensors out"
    return None
