"""A bottleneck beside the MLP of a transformer block, which may be taken out of use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..draw import changes_parameters, draw_rows
from .beside_mlp import BesideMLP

# What `scale` starts at.
SCALE = 0.1
EPS = 1e-5


class AdaptFormerMLP(BesideMLP):
    """MLP(x) + scale (Up relu(Down norm'(h) + d) + u),  x = norm(h).

    h [B, T, D] is the block's residual stream after its attention, which a hook on the norm notes
    (`listen`). norm' is a layer norm of its own. `renew` puts the bottleneck in use, with Up, d and
    u zero and scale 0.1; `drop` takes it out of use: all its tensors are then empty, and this is
    the MLP alone. So it begins.

    Args:
        base_layer: the MLP. features: D. width: of the bottleneck, W.
        dtype: of its tensors. generator: for the initial Down.
    Source: Chen et al., "AdaptFormer", NeurIPS 2022, arXiv 2205.13535. Its layer norm and its
        trained scale are inferred from a count: LADA's authors train 17,937 numbers in each of 12
        blocks of width 512 at W = 16, which is 2 W D + W + D and 2 D + 1 more.
    Cost: 4 M W D FLOPs for M tokens.
    """

    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    scale: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        features: int,
        width: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("width", width, 1)
        super().__init__(base_layer)
        self.features, self.width, self.generator = features, width, generator
        self._fill(self.like(dtype), 0, 0)

    @changes_parameters
    def renew(self) -> None:
        """Put a fresh bottleneck in use."""
        self._fill(self.down, self.width, self.features)

    @changes_parameters
    def drop(self) -> None:
        """Take the bottleneck out of use, and forget it."""
        self._fill(self.down, 0, 0)

    def _fill(self, like: Tensor, width: int, features: int) -> None:
        down = like.new_empty(0, self.features)
        if width:
            down = draw_rows((width, features), like, self.generator)
        for name, tensor in {
            "norm_weight": like.new_ones(features),
            "norm_bias": like.new_zeros(features),
            "down": down,
            "down_bias": like.new_zeros(width),
            "up": like.new_zeros(features, width),
            "up_bias": like.new_zeros(features),
            "scale": like.new_full((min(1, width),), SCALE),
        }.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.seen = True
        base = self.base_layer(x)
        if not len(self.scale):
            self.drop_residual()
            return base
        h = self.take_residual().to(self.down.dtype)
        h = F.layer_norm(h, (self.features,), self.norm_weight, self.norm_bias, EPS)
        hidden = F.relu(F.linear(h, self.down, self.down_bias))
        return base + (F.linear(hidden, self.up, self.up_bias) * self.scale).to(base.dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, width={self.width}, in_use={bool(len(self.scale))}"
