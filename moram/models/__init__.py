"""What differs from model family to model family: names of projections, and packed attention."""

from .open_clip import SplitAttention, pack_attention, split_attention
from .presets import PRESETS, TargetPreset, find_preset

__all__ = [
    "PRESETS",
    "SplitAttention",
    "TargetPreset",
    "find_preset",
    "pack_attention",
    "split_attention",
]
