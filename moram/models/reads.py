"""Projections whose weight their model reads instead of calling them. A leaf.

An adapter there would do nothing, or act in one mode alone. Found in torch 2.14, transformers 5.23
and open_clip 3.3; what is not listed is reported once other adapters were called, see
`moram.inject.uncalled`.
"""

from fnmatch import fnmatchcase

from torch import nn

from .open_clip import SplitAttention

# Pattern of the class that holds the projections: their names, and when their weight is read.
_ALWAYS, _FUSED = "always", "in its fused kernels"
_READ = (
    ("MambaMixer", ("dt_proj",), _ALWAYS),
    ("MambaMixer", ("x_proj", "out_proj"), _FUSED),
    ("FalconMambaMixer", ("x_proj", "dt_proj", "out_proj"), _FUSED),
    ("*Mamba2Mixer", ("out_proj",), _FUSED),
    ("Zamba2MambaMixer", ("out_proj",), _FUSED),
    ("BambaMixer", ("out_proj",), _FUSED),
    ("FalconH1Mixer", ("out_proj",), _FUSED),
    ("GraniteMoeHybridMambaLayer", ("out_proj",), _FUSED),
    ("WavLMAttention", ("q_proj", "k_proj", "v_proj", "out_proj"), _ALWAYS),
    ("AttentionPool2d", ("q_proj", "k_proj", "v_proj", "c_proj"), _ALWAYS),
    ("*MHAttentionMap", ("k_proj", "k_linear"), _ALWAYS),
    ("TDNNLayer", ("kernel",), _ALWAYS),
    ("LayoutLM*Encoder", ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), _ALWAYS),
    ("LongcatFlashTopkRouter", ("classifier",), _ALWAYS),
)


def why_read(parent: nn.Module, name: str) -> str | None:
    """Why a projection of a module would not be called, one sentence, or None."""
    kind = type(parent).__name__
    if isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2"):
        if isinstance(parent.self_attn, SplitAttention) or not _has_fast_path(parent):
            return None
        return (
            "nn.TransformerEncoderLayer reads its weight in eval mode and calls it in training "
            "alone; call moram.models.split_attention(model) first, which ends that"
        )
    for pattern, names, when in _READ:
        if name in names and fnmatchcase(kind, pattern):
            return (
                f"{kind} reads its weight {when} and does not call it there, so an adapter would "
                "do nothing; leave it out of targets, or exclude it"
            )
    return None


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether an `nn.TransformerEncoderLayer` may read weights and call nothing."""
    attention = layer.self_attn
    return bool(
        type(layer).forward is nn.TransformerEncoderLayer.forward
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and layer.activation_relu_or_gelu
        and attention.num_heads % 2 == 0
        and layer.norm1.eps == layer.norm2.eps
    )
