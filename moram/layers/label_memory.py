"""Vectors behind an image encoder, some for each class: a class scores by how near they are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..draw import changes_parameters
from .base import Adapter


class LabelMemory(Adapter):
    """score_c(f) = sum over units w of class c of exp(-sharpness (1 - w . f)).

    `units` [K, E] and `labels` [K] are those of the current task's classes, and are trained;
    `frozen_units` [N, E] and `frozen_labels` [N] those of earlier tasks. Labels are places in the
    joint label space. What it wraps is the identity: it stands behind the encoder, whose features
    it reads.

    Args:
        sharpness: > 0.
    Source: Luo et al., ICML 2025, arXiv 2505.23271 (LADA).
    Cost: 2 (N + K) E FLOPs an image.
    """

    units: nn.Parameter
    labels: Tensor
    frozen_units: Tensor
    frozen_labels: Tensor

    def __init__(self, sharpness: float) -> None:
        super().__init__(nn.Identity())
        self.sharpness: float = sharpness
        # E, dtype and device are those of the first units.
        self.units = nn.Parameter(torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("frozen_units", torch.empty(0, 0))
        self.register_buffer("frozen_labels", torch.empty(0, dtype=torch.int64))

    @changes_parameters
    def start(self, units: Tensor, labels: Tensor) -> None:
        """Units [K, E] and labels [K] of a new task, to be trained."""
        self.units, self.labels = nn.Parameter(units.detach().clone()), labels.clone()
        if not len(self.frozen_units):
            self.frozen_units, self.frozen_labels = units.detach()[:0].clone(), labels[:0].clone()

    @changes_parameters
    def freeze(self) -> None:
        """Freeze the current units."""
        self.frozen_units = torch.cat([self.frozen_units, self.units.detach()])
        self.frozen_labels = torch.cat([self.frozen_labels, self.labels])
        self.start(self.units[:0], self.labels[:0])

    def forward(
        self,
        features: Tensor,
        classes: int,
        part: Callable[[Tensor], Tensor] = lambda units: units,
    ) -> Tensor:
        """Scores [B, classes] of unit features [B, E].

        Args:
            classes: more than every label. part: applied to the current units, as
                `Processes.part`.
        """
        self.calls.seen = True
        units = torch.cat([self.frozen_units, part(self.units)])
        labels = torch.cat([self.frozen_labels, self.labels])
        near = (-self.sharpness * (1 - features @ units.T)).exp()
        return near.new_zeros(len(features), classes).index_add(1, labels, near)

    def extra_repr(self) -> str:
        return f"units={len(self.units)}, frozen={len(self.frozen_units)}"
