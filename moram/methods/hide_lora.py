"""HiDe-LoRA: the rows of A are kept apart by a contrastive loss."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LoRALinear
from .base import Step, total
from .lora import LoRAArguments, LoRAMethod


class HiDeLoRA(LoRAMethod[LoRALinear]):
    """One continuing LoRA with  contrast * sum over modules of CE(A A^T / temperature, identity).

    Each row of A should be like itself and unlike the others; CE is the mean over the rows.
    This is what the comparison of TreeLoRA calls HiDe-LoRA. HiDe-Prompt and HiDe-PET, after which
    it is named, also infer the task from statistics of features; that part is not here.

    Needs no task id. Stores one LoRA.

    Args:
        lora: see `LoRAMethod`.
        contrast: weight of the loss, >= 0. temperature: > 0.
    Source: Qian et al., ICML 2025, arXiv 2506.10355 (as a baseline); Wang et al., NeurIPS 2023,
        arXiv 2310.07234 (HiDe-Prompt).
    Cost: 2 rank^2 D FLOPs a module and step.
    """

    name = "HiDe-LoRA"
    layer = LoRALinear
    contrast: float
    temperature: float

    def __init__(
        self,
        *,
        contrast: float = 0.5,
        temperature: float = 0.8,
        **lora: Unpack[LoRAArguments],
    ) -> None:
        super().__init__(**lora)
        if contrast < 0 or temperature <= 0:
            raise ValueError(
                f"contrast must be >= 0 and temperature > 0, got {contrast} and {temperature}"
            )
        self.contrast, self.temperature = contrast, temperature

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        terms = []
        for layer in self.layers(model).values():
            rows = torch.arange(len(layer.lora_A), device=layer.lora_A.device)
            terms.append(F.cross_entropy(layer.lora_A @ layer.lora_A.T / self.temperature, rows))
        return self.contrast * total(terms)
