"""The base model as it is: what everything else must beat."""

from torch import nn

from .base import Method


class ZeroShot(Method):
    """No adapters, no training, no task id, nothing stored."""

    name = "zero-shot"
    has_frozen_features = True

    def setup(self, model: nn.Module) -> None:
        model.requires_grad_(False)

    def stages(self, count: int) -> list[tuple[int, ...]]:
        return [()]
