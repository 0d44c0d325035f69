"""Conventional mixture of LoRA experts: a trained router, new experts for each task."""

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from ..layers import MoELoRALinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod
from .train import Stage


class MoELoRA(LoRAMethod[MoELoRALinear]):
    """`experts` new LoRA experts per task of rank / experts each, earlier ones frozen, one router.

    auxiliary = balance * mean over modules and examples of cv^2, the squared coefficient of
    variation (variance over squared mean) of the experts' gates summed over the example's tokens.

    Deviations: the balance is measured within each example, not each batch, so that neither the
    micro-batch nor the number of processes changes a result; padding is left out of it. Its second
    term, cv^2 of the load, has no gradient without gate noise and is left out.

    Needs no task id. Stores rank per task, and a row of the router per expert.

    Args:
        lora: see `LoRAMethod`. Trained per task: a LoRA of that rank and the router, `experts` rows
            of it per task so far (of this task alone with freeze_router).
        experts: per task; divides rank. rank=8 as 1 x 8, 2 x 4, 4 x 2 or 8 x 1 is a choice of
            granularity at equal parameters but for the router.
        top_k: experts that write per token.
        balance: weight of the balance loss, >= 0.
        freeze_router: whether the router's rows of earlier experts freeze with them.
    Source: Shazeer et al., ICLR 2017, arXiv 1701.06538 (gate and balance); the architecture is the
        one that MoRAM, arXiv 2506.21035, argues against.
    """

    name = "MoE-LoRA"
    layer = MoELoRALinear
    experts: int
    top_k: int
    balance: float

    def __init__(
        self,
        *,
        experts: int = 1,
        top_k: int = 2,
        balance: float = 0.01,
        freeze_router: bool = False,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if experts < 1 or self.rank % experts:
            raise ValueError(f"experts must be >= 1 and divide rank={self.rank}, got {experts}")
        if top_k < 1 or balance < 0:
            raise ValueError(
                f"top_k must be >= 1 and balance >= 0, got top_k={top_k}, balance={balance}"
            )
        self.experts, self.top_k, self.balance = experts, top_k, balance
        self.freeze_router = freeze_router
        self._mask: Tensor | None = None

    def setup(self, model: nn.Module) -> None:
        super().setup(model)
        for layer in self.layers(model).values():
            layer.keep_gates = self.balance > 0
        if self.balance:
            model.register_forward_pre_hook(self._note_mask, with_kwargs=True)

    def wrap(self, linear: nn.Module) -> MoELoRALinear:
        return super().wrap(
            linear, experts=self.experts, top_k=self.top_k, freeze_router=self.freeze_router
        )

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        if index:
            for layer in self.layers(model).values():
                layer.grow(self.generator)

    def auxiliary(self, model: nn.Module) -> Tensor | None:
        layers = self.layers(model).values()
        gates = [layer.gates for layer in layers if layer.gates is not None]
        self._forget(layers)
        # A single expert is always balanced.
        if not gates or gates[0].shape[-1] == 1:
            return None
        return self.balance * total(imbalance(g, self._mask) for g in gates) / len(gates)

    def after_step(self, model: nn.Module, step: Step) -> None:
        self._forget(self.layers(model).values())
        self._mask = None

    def _note_mask(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _forget(self, layers: Iterable[MoELoRALinear]) -> None:
        """Drop the gates, and the graph they hold."""
        for layer in layers:
            layer.gates = None


def imbalance(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over examples of cv^2 of the experts' importance.

    Args:
        gates: [B, T, N]. mask: [B, T], 0 where a token is padding; None = no padding.
    """
    if mask is not None and mask.shape == gates.shape[:2]:
        gates = gates * mask.unsqueeze(-1).to(gates)
    importance = gates.sum(-2)
    return (importance.var(-1, correction=0) / importance.mean(-1).square()).mean()
