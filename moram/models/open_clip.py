"""open_clip's attention with q, k, v and out as Linears of their own, and back.

`nn.MultiheadAttention` keeps q, k and v in one packed parameter and reads out_proj's weight without
calling the module, so nothing inside it can be adapted. `split_attention` swaps it for modules that
compute the same; `pack_attention` restores the packed ones bit for bit. open_clip is not imported.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """Self-attention with the call of `nn.MultiheadAttention` and separate projections.

    Outputs are equal but at padded places of an `nn.TransformerEncoder`, whose fast path sets them
    to zero.

    Args:
        packed: an `nn.MultiheadAttention` with one width for q, k and v, whose weights are copied.
    Raises:
        ValueError: the attention has a form that cannot be split; the message says which.
    """

    # What `nn.TransformerEncoderLayer` looks at before it takes its fast path, which reads weights
    # and calls nothing. These say no, so that it calls this module and its own Linears.
    in_proj_bias: None = None
    _qkv_same_embed_dim: bool = False

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        problem = why_not_splittable(packed)
        if problem:
            raise ValueError(f"this nn.MultiheadAttention cannot be split: {problem}")
        self.embed_dim: int = packed.embed_dim
        self.num_heads: int = packed.num_heads
        self.dropout: float = packed.dropout
        self.batch_first: bool = packed.batch_first
        weights = packed.in_proj_weight.chunk(3)
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            setattr(self, name, _linear(weight, bias, packed.in_proj_weight.requires_grad))
        out = packed.out_proj
        self.out_proj = _linear(out.weight, out.bias, out.weight.requires_grad)
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention output and None, as `nn.MultiheadAttention` with need_weights=False.

        Args: as of `nn.MultiheadAttention`; key and value may be None for query and key.
        Raises:
            ValueError: need_weights is true, or is_causal without attn_mask.
        """
        if need_weights:
            raise ValueError("need_weights must be False: split attention returns no weights")
        if is_causal and attn_mask is None:
            raise ValueError(
                "attn_mask must be given with is_causal=True, as in nn.MultiheadAttention"
            )
        key = query if key is None else key
        value = key if value is None else value
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        out = F.scaled_dot_product_attention(
            *(self._heads(t) for t in (q, k, v)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if unbatched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, None

    def _heads(self, tensor: Tensor) -> Tensor:
        batch, tokens, width = tensor.shape
        heads = self.num_heads
        return tensor.view(batch, tokens, heads, width // heads).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor
    ) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to [B, heads, T, T], or None."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, like)
            if mask.dim() == 3:
                mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, like)[..., None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    # nn.MultiheadAttention's boolean masks mark what is hidden.
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    like = {"device": weight.device, "dtype": weight.dtype}
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, **like
    )
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(trainable)


def why_not_splittable(packed: nn.MultiheadAttention) -> str | None:
    """Why an nn.MultiheadAttention cannot be split, a few words, or None."""
    if not packed._qkv_same_embed_dim:
        return "its keys or values have a width of their own (kdim, vdim)"
    if packed.bias_k is not None or packed.add_zero_attn:
        return "it appends to keys and values (add_bias_kv, add_zero_attn)"
    return None


def split_attention(model: nn.Module, prefixes: Iterable[str] = ("",)) -> list[str]:
    """Swap every splittable `nn.MultiheadAttention` below the prefixes for a `SplitAttention`.

    Returns:
        The paths that were swapped. An attention of another form is left alone.
    """
    return _swap(
        model,
        prefixes,
        lambda m: isinstance(m, nn.MultiheadAttention) and why_not_splittable(m) is None,
        SplitAttention,
    )


def pack_attention(model: nn.Module) -> list[str]:
    """Inverse of `split_attention`: the state dict is open_clip's again, bit for bit.

    Returns:
        The paths that were swapped.
    Raises:
        ValueError: a projection is still adapted, or a Linear of the encoder layer around it;
            eject the adapters first.
    """
    for path, module in model.named_modules():
        names = ()
        if isinstance(module, SplitAttention):
            names = ("q_proj", "k_proj", "v_proj", "out_proj")
        elif isinstance(module, nn.TransformerEncoderLayer):
            # With packed attention it would read their weights and skip the adapters.
            names = ("linear1", "linear2") if isinstance(module.self_attn, SplitAttention) else ()
        for name in names:
            if type(getattr(module, name)) is not nn.Linear:
                raise ValueError(
                    f"{path}.{name} is a {type(getattr(module, name)).__name__}, which cannot "
                    "be packed; call moram.eject(model) first"
                )
    return _swap(model, ("",), lambda m: isinstance(m, SplitAttention), _packed)


def _packed(split: SplitAttention) -> nn.MultiheadAttention:
    biased = split.q_proj.bias is not None
    weight = split.q_proj.weight
    packed = nn.MultiheadAttention(
        split.embed_dim,
        split.num_heads,
        dropout=split.dropout,
        bias=biased,
        batch_first=split.batch_first,
        device=weight.device,
        dtype=weight.dtype,
    )
    parts = (split.q_proj, split.k_proj, split.v_proj)
    with torch.no_grad():
        packed.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        packed.out_proj.weight.copy_(split.out_proj.weight)
        if biased:
            packed.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
            packed.out_proj.bias.copy_(split.out_proj.bias)
    packed.requires_grad_(weight.requires_grad)
    return packed.train(split.training)


def _swap(
    model: nn.Module,
    prefixes: Iterable[str],
    matches: Callable[[nn.Module], bool],
    build: Callable[[Any], nn.Module],
) -> list[str]:
    if matches(model):
        raise ValueError(f"model must hold attention modules, got a {type(model).__name__} itself")
    uses: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if matches(module):
            uses.setdefault(module, []).append(path)
    swapped = []
    for module, paths in uses.items():
        if any(path.startswith(tuple(prefixes)) for path in paths):
            built = build(module)
            for path in paths:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, built)
            swapped.append(paths[0])
    settle_encoders(model)
    return swapped


def settle_encoders(model: nn.Module) -> None:
    """Keep every `nn.TransformerEncoder` with split attention from nested tensors, which only the
    packed one takes, and let it use them again once packed."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            is_split = any(isinstance(module, SplitAttention) for module in encoder.modules())
            if is_split and encoder.use_nested_tensor:
                encoder.use_nested_tensor = False
                # The stub of nn.Module lets set tensors and modules alone.
                encoder.used_nested_tensor = True  # pyright: ignore[reportArgumentType]
            elif not is_split and getattr(encoder, "used_nested_tensor", False):
                encoder.use_nested_tensor = True
                del encoder.used_nested_tensor
