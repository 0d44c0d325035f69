"""One way to call any CLIP: open_clip's or Hugging Face's. Loads one, too; trains nothing.

Importing this imports neither library; loading a model imports the one that it needs.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn


class Preprocess(NamedTuple):
    """What a CLIP expects of an image: side in pixels, mean and std of each channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# OpenAI's, which nearly all CLIPs use.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model and its tokenizer behind four calls. Holds the model, is not a module.

    Args:
        model: an open_clip model (with encode_image and encode_text) or a `transformers.CLIPModel`.
        tokenize: function from a list of texts to token ids [C, L].
        preprocess: `Preprocess`.
    """

    def __init__(
        self, model: nn.Module, tokenize: Callable[[list[str]], Tensor], preprocess: Preprocess
    ) -> None:
        # Of two libraries, which call their parts differently.
        self.model: Any = model
        self.tokenize: Callable[[list[str]], Tensor] = tokenize
        self.preprocess: Preprocess = preprocess
        self._is_open_clip = hasattr(model, "encode_image")

    @property
    def parameter(self) -> nn.Parameter:
        """Any parameter, for its device and dtype."""
        return self.model.logit_scale

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, a scalar tensor (100 in OpenAI's)."""
        return self.model.logit_scale.exp()

    def tokens(self, prompts: Iterable[str]) -> Tensor:
        """Token ids [C, L] of some texts, on the model's device."""
        return self.tokenize(list(prompts)).to(self.parameter.device)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit features [B, E] of normalised images [B, 3, H, W]."""
        if self._is_open_clip:
            return self.model.encode_image(pixels, normalize=True)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit features [C, E] of token ids [C, L]."""
        if self._is_open_clip:
            return self.model.encode_text(ids, normalize=True)
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled similarities [B, C] of unit features [B, E] and [C, E]."""
        return self.scale * images @ texts.T


def load_clip(backbone: str, pretrained: str = "auto", device: torch.device | str = "cpu") -> Clip:
    """A CLIP in float32 and eval mode.

    Args:
        backbone: an open_clip name ("ViT-B-16", "hf-hub:ORG/NAME", "local-dir:FOLDER"), or a hub id
            with a slash or a folder of a Hugging Face CLIP.
        pretrained: an open_clip tag or a file of weights, for open_clip's plain names alone.
            "auto" is "openai" for them; a folder or hub id brings its own. "random" leaves the
            model random (open_clip alone). OpenAI's own files (TorchScript) are read, too, and
            imply QuickGELU, as the tag and file names with "openai" do. For a file of their
            weights under another name, the backbone must say it: "ViT-B-16-quickgelu".
        device: a torch device.
    Returns:
        `Clip`.
    Raises:
        ValueError, OSError: there is no such model, tag or file.
    """
    brings_own = backbone.startswith(("hf-hub:", "local-dir:"))
    is_hugging_face = not brings_own and ("/" in backbone or Path(backbone).is_dir())
    allowed = ("auto",) if is_hugging_face else ("auto", "random") if brings_own else None
    if allowed and pretrained not in allowed:
        raise ValueError(
            f"pretrained must be {' or '.join(allowed)} with {backbone}, which brings its own "
            f"weights, got {pretrained!r}"
        )
    if is_hugging_face:
        return _load_hugging_face(backbone, device)
    if not brings_own:
        _check_names(backbone, pretrained)
    return _load_open_clip(backbone, pretrained, brings_own, device)


def _check_names(backbone: str, pretrained: str) -> None:
    import open_clip

    names = open_clip.list_models()
    if backbone not in names:
        raise ValueError(
            f"backbone must be a model of open_clip, or a Hugging Face CLIP with a slash, got "
            f"{backbone!r}; open_clip has {len(names)}, such as ViT-B-16"
        )
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    tag = "openai" if pretrained == "auto" else pretrained
    if tag != "random" and tag not in tags and not Path(tag).is_file():
        raise ValueError(
            f"pretrained must be random, a file, or a tag of {backbone} "
            f"({', '.join(tags) or 'it has none'}), got {tag!r}"
        )


def _load_open_clip(
    backbone: str, pretrained: str, brings_own: bool, device: torch.device | str
) -> Clip:
    import open_clip

    source = None
    if not brings_own and pretrained != "random":
        source = "openai" if pretrained == "auto" else pretrained
    # OpenAI's weights were trained with QuickGELU, whichever way they come.
    quick = source is not None and "openai" in Path(source).name.lower()
    more: dict[str, Any] = {
        "force_quick_gelu": quick,
        "load_weights": pretrained != "random",
        "device": device,
    }
    try:
        script = _read_script(source)
        if script is not None:
            # OpenAI's own files: always QuickGELU, in 16 bits.
            more |= {"force_quick_gelu": True, "load_weights": False}
            model = open_clip.create_model(backbone, None, **more)
            model.load_state_dict(script)
        else:
            model = open_clip.create_model(backbone, source, **more)
    except RuntimeError as error:
        raise ValueError(f"the weights {source} do not fit {backbone}: {error}") from error
    except (EOFError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"the weights {source} cannot be read: {error!r}") from error
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    size = size if isinstance(size, int) else size[0]
    preprocess = Preprocess(size, tuple(config["mean"]), tuple(config["std"]))
    return Clip(model.eval(), open_clip.get_tokenizer(backbone), preprocess)


def _read_script(source: str | None) -> dict[str, Tensor] | None:
    """The weights in a TorchScript archive, in float32; None if the file is none."""
    if source is None or not Path(source).is_file() or not zipfile.is_zipfile(source):
        return None
    with zipfile.ZipFile(source) as archive:
        if not any("/code/" in name for name in archive.namelist()):
            return None
    state = torch.jit.load(source, map_location="cpu").state_dict()
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {name: t.float() for name, t in state.items() if name not in sizes}


def _load_hugging_face(name: str, device: torch.device | str) -> Clip:
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    config = AutoConfig.from_pretrained(name)
    if config.model_type != "clip":
        raise ValueError(f"{name} must hold a CLIP, got a model of type {config.model_type!r}")
    model = CLIPModel.from_pretrained(name, dtype=torch.float32)
    # transformers decorates `to` with what hides its parameters.
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    tokenizer = AutoTokenizer.from_pretrained(name)
    length = config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    preprocess = Preprocess(config.vision_config.image_size, MEAN, STD)
    return Clip(model.eval(), tokenize, preprocess)
