"""What stands beside the MLP of a transformer block and reads the block's residual stream."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .base import Adapter


class BesideMLP(Adapter):
    """Wraps an MLP whose input is norm(h), and knows h [B, T, D], which a hook on the norm notes.

    Args:
        base_layer: the MLP.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._residual: Tensor | None = None

    @property
    def c_fc(self) -> nn.Module:
        """The base's first Linear, which open_clip's block asks for its dtype."""
        return self.base_layer.get_submodule("c_fc")

    def like(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor of that dtype where the MLP is."""
        device = next((p.device for p in self.base_layer.parameters()), None)
        return torch.empty(0, dtype=dtype, device=device)

    def listen(self, norm: nn.Module) -> RemovableHandle:
        """Note what enters the norm before this MLP. Returns the hook's handle."""
        return norm.register_forward_pre_hook(self._note_residual)

    def _note_residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._residual = args[0]

    def drop_residual(self) -> Tensor | None:
        """Forget h, which is returned: its graph would be held."""
        residual, self._residual = self._residual, None
        return residual

    def take_residual(self) -> Tensor:
        """h of the call that is going on, once."""
        residual = self.drop_residual()
        if residual is None:
            raise RuntimeError(
                f"{type(self).__name__} needs what enters the norm before the MLP; call "
                "listen(norm) once"
            )
        return residual
