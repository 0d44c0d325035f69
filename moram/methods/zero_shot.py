"""The base model as it is: what everything else must beat."""

from .base import Method


class ZeroShot(Method):
    """No adapters, no training, no task id, nothing stored."""

    name = "zero-shot"
    has_frozen_features = True

    def setup(self, model):
        model.requires_grad_(False)

    def stages(self, count):
        return [()]
