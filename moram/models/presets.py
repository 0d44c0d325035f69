"""Which projections to adapt, per model family. A leaf: imports no model library."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HF_CLIP = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mlp.fc1",
    "mlp.fc2",
)
_OPEN_CLIP = (
    *(f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mlp.c_fc",
    "mlp.c_proj",
)


@dataclass(frozen=True)
class TargetPreset:
    """The projections of a model family.

    Args:
        targets, exclude: as in `MoRAMConfig`.
        split: path prefixes below which packed attention must be split first (open_clip).
        towers: of each tower the path prefixes that it may have; a target must match in each that
            the model has.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    towers: tuple[tuple[str, ...], ...] = ()


def _language_presets() -> Iterator[tuple[str, TargetPreset]]:
    # Multimodal Gemma 3 repeats the language model's names in its vision tower.
    exclude = {"gemma3": ("*vision_tower*", "*multi_modal_projector*")}
    for family in ("llama", "mistral", "gemma", "gemma2", "gemma3", "qwen2", "qwen3"):
        yield family, TargetPreset(_ATTENTION, exclude.get(family, ()))
        yield f"{family}+mlp", TargetPreset(_ATTENTION + _MLP, exclude.get(family, ()))


_OPEN_CLIP_VISION, _OPEN_CLIP_TEXT = ("visual.",), ("transformer.", "text.")

# The paper's placements: attention in language models (TRACE), attention and MLP in CLIP (X-TAIL).
PRESETS = {
    **dict(_language_presets()),
    "clip": TargetPreset(_HF_CLIP, towers=(("vision_model.",), ("text_model.",))),
    "clip-vision": TargetPreset(_HF_CLIP, exclude=("*text_model.*",)),
    "clip-text": TargetPreset(_HF_CLIP, exclude=("*vision_model.*",)),
    "open_clip": TargetPreset(
        _OPEN_CLIP,
        exclude=("visual.attn_pool.*",),
        split=_OPEN_CLIP_VISION + _OPEN_CLIP_TEXT,
        towers=(_OPEN_CLIP_VISION, _OPEN_CLIP_TEXT),
    ),
    "open_clip-vision": TargetPreset(
        _OPEN_CLIP,
        exclude=("transformer.*", "text.*", "visual.attn_pool.*"),
        split=_OPEN_CLIP_VISION,
    ),
    "open_clip-text": TargetPreset(_OPEN_CLIP, exclude=("visual.*",), split=_OPEN_CLIP_TEXT),
}

_MODEL_TYPES: dict[str | None, str] = {
    "gemma3_text": "gemma3",
    "clip_vision_model": "clip",
    "clip_text_model": "clip",
}


def find_preset(model: nn.Module) -> str:
    """The name of the preset for a model.

    Raises:
        ValueError: the family is not known; the message lists the presets.
    """
    if type(model).__module__.split(".")[0] == "open_clip":
        return "open_clip"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = _MODEL_TYPES.get(model_type, model_type)
    if name not in PRESETS:
        raise ValueError(
            f'targets="auto" does not know {type(model).__name__} (model_type {model_type!r}); '
            f"name the projections, or a preset: {', '.join(PRESETS)}"
        )
    return name
