"""The MoRAM layer: a frozen Linear plus a bank of atoms that decide for themselves when to fire."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moram_kernels import SelfActivation, reference, retrieve, retrieve_linear
from moram_kernels.api import may_be_triton, retrieve_one

from ..bank import AtomBank
from ..config import MoRAMConfig
from .base import AdapterLinear, device_of
from .shared import SharedInput


class MoRAMLinear(AdapterLinear):
    """A drop-in `nn.Linear`: base(x) + sum_i w_i s_i values_i over all atoms of the bank.

    Starts with one task's atoms, whose values are zero: the output is the base's.

    Args:
        in_features, out_features, bias, device, dtype: of the base, as for `nn.Linear`.
        config: `MoRAMConfig`; its targets are not used here.
        backend: overrides config.backend.
        generator: for the initial keys.
    """

    # Whether it is the base alone for now.
    paused: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: MoRAMConfig | None = None,
        backend: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(base, config, backend, generator)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: MoRAMConfig | None = None,
        backend: str | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Wrap an existing Linear, also a quantised one, without copying it.

        Args:
            linear: the module to wrap. config, backend, generator: as for the class.
        """
        layer = cls.__new__(cls)
        layer._setup(linear, config, backend, generator)
        return layer

    def _setup(
        self,
        base_layer: nn.Module,
        config: MoRAMConfig | None,
        backend: str | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(base_layer)
        config = MoRAMConfig() if config is None else config
        if not isinstance(config, MoRAMConfig):
            raise TypeError(f"config must be a MoRAMConfig, got {type(config).__name__}")
        self.configure(config, backend)
        capacity = 8 * config.atoms_per_task if config.capacity is None else config.capacity
        self.bank: AtomBank = AtomBank(
            self.in_features,
            self.out_features,
            capacity=capacity,
            value_scale=config.value_scale,
            device=device_of(self.base_layer),
            dtype=getattr(torch, config.atom_dtype),
        )
        self.bank.append(config.atoms_per_task, generator)
        # Names of what was trained beside the adapters of the model, see `moram.beside`.
        self.beside: frozenset[str] = frozenset()
        # Set by `inject(.., share_inputs=True)`.
        self.shared: SharedInput | None = None

    def configure(self, config: MoRAMConfig, backend: str | None = None) -> None:
        """Take over settings; the bank keeps its atoms."""
        self.config: MoRAMConfig = config
        self.activation: SelfActivation = config.activation
        self.backend: str = config.backend if backend is None else backend
        if hasattr(self, "bank"):
            self.bank.value_scale = config.value_scale

    @property
    def is_active(self) -> bool:
        return not self.paused

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        if not self.is_active:
            return self.base_layer(x)
        # A module's attributes are slow to find.
        bank, base_layer, config = self.bank, self.base_layer, self.config
        call: dict[str, Any] = {"training": self.training, "backend": self.backend}
        call["precision"] = config.precision
        whole, parts = False, ()
        if torch.compiler.is_compiling():
            # Whole buffers and a count that is data: nothing to recompile when a task is added.
            keys, values, call["num_frozen"] = (
                bank.frozen_keys,
                bank.frozen_values,
                bank.live_count(),
            )
            call["current_keys"], call["current_values"] = bank.acting_keys(), bank.scaled_values()
        else:
            keys, values, call["current_keys"], call["current_values"] = parts = bank.segments()
            if keys.shape[0] + parts[2].shape[0] == 0:
                return base_layer(x)
            whole = config.dropout == 0 and not self._looks
        if whole and may_be_triton(self.backend, x):
            if self.shared is not None:
                call["scores"] = self.shared.scores(self, x)
            if _is_plain(base_layer):
                weight, bias = base_layer.weight, base_layer.bias
                return retrieve_linear(x, weight, bias, keys, values, self.activation, **call)
        base = base_layer(x)
        if whole and x.numel() == self.in_features:
            output = retrieve_one(x, parts, self.activation, base, self.training, self.backend)
            if output is not None:
                return output
        if config.dropout:
            x = F.dropout(x, config.dropout, self.training)
        if self._looks:
            # Raw scores of 0 write nothing.
            x = x.masked_fill(~self._aligned(x, keys, call["current_keys"]), 0)
        return retrieve(x, keys, values, self.activation, residual=base, **call)

    @property
    def _looks(self) -> bool:
        """Whether inputs are looked at before atoms write."""
        return self.config.alignment > 0 and not self.training

    def _aligned(self, x: Tensor, *keys: Tensor) -> Tensor:
        """At which inputs x [..., D] atoms may write, bool [..., 1], see `MoRAMConfig.alignment`;
        keys of zeros, such as spare rows, never win."""
        rows = torch.cat(keys)
        best, index = reference.score_atoms(x, rows).max(-1)
        norms = torch.linalg.vector_norm(rows.to(best.dtype), dim=-1)[index]
        norms = norms * torch.linalg.vector_norm(x.to(best.dtype), dim=-1)
        return ((best > 0) & (best >= self.config.alignment * norms))[..., None]

    def adapter_state(self) -> dict[str, Tensor]:
        # As many frozen rows as live ones say how many are live.
        state = self.bank.state_dict()
        return {f"bank.{name}": t for name, t in state.items() if name != "live"}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        self.bank.load_state_dict({name.removeprefix("bank."): t for name, t in state.items()})

    @torch.no_grad()
    def mixture_weights(self, x: Tensor) -> Tensor:
        """The weight of every atom for inputs x [..., D], frozen first: [..., N], as in eval mode.

        For looking into a model; `forward` does not call it.
        """
        return self._weigh(x)[0]

    @torch.no_grad()
    def fire(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mixture_weights` [..., N], and the update that they write for inputs x: [..., O]."""
        weights, scores = self._weigh(x)
        _, values, _, current_values = self.bank.segments()
        values = torch.cat([values, current_values])
        return weights, reference.aggregate_values(weights, scores, values)

    def _weigh(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixture weights, as in eval mode, and scores of all atoms, each [..., N]."""
        keys, _, current_keys, _ = self.bank.segments()
        scores = reference.score_atoms(x, torch.cat([keys, current_keys]))
        norm_scores = reference.normalize_scores(scores, self.activation.eps)
        selected = reference.select_atoms(norm_scores, self.activation.top_k)
        weights = reference.mixture_weights(norm_scores, selected, self.activation)
        if self.config.alignment > 0:
            weights = weights * self._aligned(x, keys, current_keys)
        return weights, scores


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling a Linear does nothing but x weight^T + bias."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        # Quantised Linears keep the class and change the weight's.
        return False
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    overridden = any(hooks) or nn.modules.module._has_any_global_hook()
    return not overridden and "forward" not in vars(linear)
