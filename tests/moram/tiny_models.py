"""Tiny random models that tests of `moram` share, and how to look at one. No tests here."""

import torch
from torch import nn

import moram
from moram import MoRAMConfig, adapters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_HEAD_DIM = {"head_dim": 8}
_FAMILIES = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", _HEAD_DIM),
    "Gemma": ("GemmaConfig", _HEAD_DIM),
    "Gemma2": ("Gemma2Config", _HEAD_DIM),
    "Gemma3": ("Gemma3TextConfig", _HEAD_DIM),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", _HEAD_DIM),
}


def language_model(family="Llama", seed=0, **changes):
    """A causal language model with two layers of width 32, in eval mode."""
    import transformers

    config_name, more = _FAMILIES[family]
    config = getattr(transformers, config_name)(**(_SIZES | more | changes))
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def gemma3_multimodal():
    """Gemma 3 with a vision tower whose projections have the language model's names."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(**(_SIZES | _HEAD_DIM | {"vocab_size": 128}))
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def hf_clip():
    """A Hugging Face CLIP with two layers in either tower."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = sizes | {"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()


def open_clip_model(kind="CLIP", **vision):
    """An open_clip CLIP with two layers in either tower; kind may be "CustomTextCLIP"."""
    from open_clip import model

    vision = {
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 16,
        "image_size": 32,
        **vision,
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    return getattr(model, kind)(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


def token_ids(rows=2, length=6, seed=1):
    """Token ids of the tiny vocabularies, without the padding id 0."""
    return torch.randint(1, 63, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(rows=2):
    """Images for the tiny CLIPs."""
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def small_config(**changes):
    """Four atoms a task, two of them selected; no threshold, so that atoms always write."""
    settings = {"atoms_per_task": 4, "top_k": 2, "temperature": 0.3, "threshold": 0.0}
    return MoRAMConfig(**(settings | {"value_scale": 2.0} | changes))


def fill_values(model, seed=0):
    """Give all current atoms random values, as training would; zero values hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            values = adapter.bank.current_values
            values.copy_(torch.randn(values.shape, generator=generator))


class Mlp(nn.Module):
    """The smallest model with two projections."""

    def __init__(self, width=8, hidden=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def trained_mlp(tasks=2, seed=0, **settings):
    """An `Mlp` with adapters after some tasks."""
    model = Mlp()
    config = small_config(targets=("up", "down"), **settings)
    generator = torch.Generator().manual_seed(seed)
    moram.inject(model, config, generator=generator)
    for task in range(tasks):
        if task:
            moram.grow(model, generator=generator)
        fill_values(model, seed + task)
    return model.eval()


def describe(model):
    """Everything that an operation which fails must leave as it was."""
    return {
        "modules": {path: type(m).__name__ for path, m in model.named_modules()},
        "modes": {path: m.training for path, m in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
    }


def assert_untouched(model, before):
    """The model is what `describe` saw."""
    after = describe(model)
    for part in ("modules", "modes", "trainable"):
        assert after[part] == before[part], part
    assert list(after["tensors"]) == list(before["tensors"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name


def assert_equal(a, b):
    """Nested containers of tensors and numbers are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def small_bank(frozen, current, seed=0):
    """A bank [.., 5] -> [.., 3] with random atoms."""
    bank = moram.AtomBank(5, 3)
    generator = torch.Generator().manual_seed(seed)
    for count in (frozen, current):
        bank.freeze()
        if count:
            bank.append(count, generator)
            with torch.no_grad():
                bank.current_values.uniform_(generator=generator)
    return bank
