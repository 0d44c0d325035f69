"""The layer of a PEFT adapter: the library's own `MoRAMLinear`, with a bank for each adapter."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import MoRAMConfig
from ..layers import AdapterLinear, MoRAMLinear
from ..layers.base import device_of
from .bank import TunerBank
from .config import MoRAMPeftConfig

NO_MERGE = (
    "MoRAM cannot be merged into the base: what an atom writes depends on the input, so no weight "
    "does the same; keep the adapter attached, or take it out with unload()"
)


class MoRAMTunerLinear(MoRAMLinear, BaseTunerLayer):
    """A `MoRAMLinear` whose bank is that of the active adapter; without one, the base alone.

    Args:
        base_layer: the Linear to wrap. adapter_name: the adapter that is active.
    """

    adapter_layer_names: tuple[str, ...] = ("moram_bank",)
    other_param_names: tuple[str, ...] = ("moram_config", "moram_settings")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        AdapterLinear.__init__(self, base_layer)
        self.moram_bank: nn.ModuleDict = nn.ModuleDict()
        # By adapter: PEFT's config, and what of it is this layer's.
        self.moram_config: dict[str, MoRAMPeftConfig] = {}
        self.moram_settings: dict[str, MoRAMConfig] = {}
        self.beside = frozenset()
        self.shared = None
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]

    def add_bank(self, name: str, config: MoRAMPeftConfig, path: str) -> None:
        """Give the layer a bank for an adapter.

        Args:
            path: of the layer in the plain model, under which the config keeps its sizes.
        """
        settings, sizes = config.settings_of(path), config.layers.setdefault(path, {})
        if settings.atoms_per_task != config.atoms_per_task:
            sizes["atoms_per_task"] = settings.atoms_per_task
        self.moram_bank[name] = TunerBank(
            self.in_features,
            self.out_features,
            settings,
            path=path,
            sizes=sizes,
            known=config.protection.setdefault(path, {}),
            device=device_of(self.base_layer),
        )
        self.moram_config[name], self.moram_settings[name] = config, settings
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def has_bank(self) -> bool:
        """Whether the active adapter adapts this layer."""
        return bool(self._active_adapter) and self._active_adapter[0] in self.moram_bank

    @property
    def is_active(self) -> bool:
        return super().is_active and self.has_bank and not self._disable_adapters

    @property
    def bank(self) -> TunerBank:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.bank_of(self._active_adapter[0])

    def bank_of(self, name: str) -> TunerBank:
        """The bank of an adapter."""
        bank = self.moram_bank[name]
        assert isinstance(bank, TunerBank)
        return bank

    def configure(self, config: MoRAMConfig, backend: str | None = None) -> None:
        name = self._active_adapter[0]
        self.moram_settings[name] = config
        self.moram_config[name].take_settings(config)
        super().configure(config, backend)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            ValueError: more than one is named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"adapter_names must name one MoRAM adapter, got {', '.join(names)}: tasks that "
                "act together are learned one after the other in one adapter (moram.task)"
            )
        super().set_adapter(names, inference_mode)
        if self.has_bank:
            super().configure(self.moram_settings[names[0]])

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT would give atoms the base's dtype, too, and what they have lost would stay lost.
        if adapter_name in self.moram_bank:
            bank = self.bank_of(adapter_name)
            if not any(parameter.is_meta for parameter in bank.parameters()):
                bank.to(device_of(self.base_layer) if device is None else device)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError: there is nothing that a weight could do instead."""
        raise NotImplementedError(NO_MERGE)

    unmerge = merge

    def __repr__(self) -> str:
        return f"moram.{super().__repr__()}"
