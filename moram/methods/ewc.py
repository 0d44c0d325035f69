"""EWC on LoRA: parameters that earlier tasks need are held where those tasks left them."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..layers import LoRALinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod
from .train import Stage


class EWC(LoRAMethod[LoRALinear]):
    """One continuing LoRA with  0.5 * lam * sum F (theta - theta*)^2  over A and B of all modules.

    On images, F is of the loss from images to prompts: one image alone has no other.

    After each task F <- gamma F + F_task and theta* <- theta: the Fisher information of the tasks
    is summed (gamma = 1) or decays (online EWC), around the last task's optimum alone.
    F_task is the empirical diagonal: the mean over training examples of the squared gradient of
    the example's loss (the mean over its answer tokens), dropout off.

    Deviations: the published method regularises all weights of the model, here those of the LoRA;
    the comparison code of TRACE squares gradients of batches during training, which include the
    penalty's, here they are single examples' after the task.

    Needs no task id. Stores one LoRA and twice as much beside it (F and theta*).

    Args:
        lora: see `LoRAMethod`.
        lam: weight of the penalty, >= 0.
        gamma: what is left of the earlier tasks' Fisher information, in [0, 1].
        fisher_examples: training examples to pass over, the first ones; None = all.
    Source: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; Huszar, arXiv 1712.03847 (one anchor);
        Schwarz et al., ICML 2018, arXiv 1805.06370 (gamma).
    Cost: one forward and backward pass per example after the task; in each step as much as the
        optimiser.
    """

    name = "EWC"
    layer = LoRALinear
    lam: float
    gamma: float
    fisher_examples: int | None

    def __init__(
        self,
        *,
        lam: float = 400.0,
        gamma: float = 1.0,
        fisher_examples: int | None = None,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if lam < 0 or not 0 <= gamma <= 1:
            raise ValueError(f"lam must be >= 0 and gamma in [0, 1], got {lam} and {gamma}")
        if fisher_examples is not None and fisher_examples < 1:
            raise ValueError(f"fisher_examples must be >= 1 or None, got {fisher_examples}")
        self.lam, self.gamma, self.fisher_examples = lam, gamma, fisher_examples
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        if not self.fisher:
            return None
        terms = []
        for name, parameter in self._parameters(model).items():
            for held in (self.fisher, self.anchor):
                # After a restart they may still lie on the CPU.
                held[name] = held[name].to(parameter.device)
            terms.append((self.fisher[name] * (parameter - self.anchor[name]).square()).sum())
        return 0.5 * self.lam * total(terms)

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        parameters = self._parameters(model)
        fresh = {name: torch.zeros_like(p) for name, p in parameters.items()}
        count = 0
        # One example at a time, so that the memory setting changes nothing.
        for loss, examples in stage.losses(self.fisher_examples, size=1):
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for square, gradient in zip(fresh.values(), gradients, strict=True):
                square += gradient.square()
            count += examples
        for name, parameter in parameters.items():
            task = fresh[name] / max(1, count)
            before = self.fisher.get(name)
            self.fisher[name] = (
                task if before is None else self.gamma * before.to(task.device) + task
            )
            self.anchor[name] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fisher": dict(self.fisher), "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.fisher, self.anchor = dict(state["fisher"]), dict(state["anchor"])

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
