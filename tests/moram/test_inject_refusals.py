"""Injections that are refused: the message names the reason, and the model is left as it was."""

import re

import pytest
import torch
from tiny_models import (
    assert_untouched,
    describe,
    language_model,
    open_clip_model,
    small_config,
)
from torch import nn

import moram
from moram.models import split_attention


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).eval()


class NamedHead(nn.Module):
    """A model whose head has another name than lm_head, known as the output embedding alone."""

    def __init__(self):
        super().__init__()
        self.body, self.scores = nn.Linear(8, 8), nn.Linear(8, 20)

    def get_output_embeddings(self):
        return self.scores


HEAD = "the output head is not adapted: fused losses read its weight and skip the module"
CASES = {
    "no_match": (
        language_model,
        ("q_proj", "k_porj"),
        "target 'k_porj' matches no module of LlamaForCausalLM; closest names: k_proj,",
    ),
    "no_close_name": (
        NamedHead,
        ("zzz",),
        "target 'zzz' matches no module of NamedHead; closest names: body, scores",
    ),
    "no_linear": (nn.ReLU, ("up",), "closest names: the model has no Linear"),
    "packed_out_proj": (
        open_clip_model,
        ("c_fc", "out_proj"),
        "target 'out_proj' matches visual.transformer.resblocks.0.attn.out_proj: out_proj inside "
        "nn.MultiheadAttention is read, never called, so an adapter there would do nothing; use "
        "an open_clip preset or call moram.models.split_attention(model) first",
    ),
    "packed_q_proj": (
        open_clip_model,
        ("q_proj",),
        "the model has nn.MultiheadAttention, whose projections are packed: use an open_clip "
        "preset or call moram.models.split_attention(model) first",
    ),
    "lm_head": (language_model, ("lm_head",), f"target 'lm_head' matches lm_head: {HEAD}"),
    "lm_head_by_pattern": (language_model, ("lm_*",), f"target 'lm_*' matches lm_head: {HEAD}"),
    "output_embedding": (NamedHead, ("scores",), f"target 'scores' matches scores: {HEAD}"),
    "conv1d": (
        gpt2,
        ("c_attn",),
        "target 'c_attn' matches transformer.h.0.attn.c_attn: Conv1D (GPT-2) stores its weight "
        "transposed and is not supported",
    ),
    "not_linear": (
        language_model,
        ("q_proj", "input_layernorm"),
        "target 'input_layernorm' matches model.layers.0.input_layernorm: got LlamaRMSNorm, which "
        "lacks in_features, out_features or weight",
    ),
    "unknown_family": (
        gpt2,
        "auto",
        "targets=\"auto\" does not know GPT2LMHeadModel (model_type 'gpt2'); name the projections, "
        "or a preset: llama, llama+mlp, mistral,",
    ),
    "unknown_preset": (
        language_model,
        "lama",
        "targets must be \"auto\", a preset or a tuple of names, got 'lama'; presets: llama,",
    ),
    "wrong_preset": (language_model, "clip", "target 'self_attn.out_proj' matches no module"),
    "preset_that_splits": (
        lambda: nn.ModuleDict({"visual": nn.TransformerEncoderLayer(8, 2, 16)}),
        "open_clip",
        "target 'attn.q_proj' matches no module of ModuleDict",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_target_is_explained_and_the_model_untouched(case):
    build, targets, message = CASES[case]
    model = build().train()
    before = describe(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        moram.inject(model, small_config(targets=targets))
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["k_porj", "model.layers.7", "proj", "*.vision.*"])
def test_an_exclude_that_matches_nothing_is_refused_and_the_model_untouched(name):
    model = language_model()
    before = describe(model)
    message = f"exclude {name!r} matches no module of LlamaForCausalLM; closest names: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        moram.inject(model, small_config(exclude=(name,)))
    assert_untouched(model, before)


class TimmTower(nn.Module):
    """An image encoder whose blocks have timm's names."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})


def timm_clip():
    model = open_clip_model()
    model.visual = TimmTower()
    return model


TOWERS = {
    "resnet": (
        lambda: open_clip_model(layers=[1, 1, 1, 1], patch_size=None, head_width=16),
        "visual (ModifiedResNet)",
    ),
    "timm": (timm_clip, "visual (TimmTower)"),
}


@pytest.mark.parametrize("targets", ["auto", "open_clip"])
@pytest.mark.parametrize("case", TOWERS)
def test_one_tower_of_two_is_not_adapted_in_silence(case, targets):
    build, tower = TOWERS[case]
    model = build()
    before = describe(model)
    message = (
        f"targets must match projections in every tower, got none in {tower}, whose blocks this "
        "preset does not know; take a preset for the other tower alone, name projections, or "
        'exclude "visual"'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.inject(model, small_config(targets=targets))
    assert_untouched(model, before)


def test_injecting_twice_is_refused():
    model = language_model()
    moram.inject(model, small_config())
    before = describe(model)
    message = (
        "target 'q_proj' matches model.layers.0.self_attn.q_proj: it is already adapted "
        "(MoRAMLinear); eject the adapters first"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        moram.inject(model, small_config())
    assert_untouched(model, before)


def test_base_layers_of_adapters_are_no_targets():
    model = language_model()
    moram.inject(model, small_config())
    before = describe(model)
    with pytest.raises(ValueError, match="target 'base_layer' matches no module"):
        moram.inject(model, small_config(targets=("base_layer",)))
    assert_untouched(model, before)


def test_refusal_after_splitting_packs_the_attention_again():
    model = open_clip_model()
    before = describe(model)
    config = small_config(targets="open_clip", exclude=("*c_fc",))
    with pytest.raises(ValueError, match=r"target 'mlp\.c_fc' matches no module of CLIP"):
        moram.inject(model, config)
    assert_untouched(model, before)


def test_refusal_keeps_attention_split_that_was_split_before():
    model = open_clip_model()
    split_attention(model, ("visual.",))
    before = describe(model)
    with pytest.raises(ValueError, match=r"target 'mlp\.c_fc' matches no module of CLIP"):
        moram.inject(model, small_config(targets="open_clip", exclude=("*c_fc",)))
    assert_untouched(model, before)


def test_adapting_a_second_tower_twice_names_the_adapted_module():
    model = open_clip_model()
    moram.inject(model, small_config(targets="open_clip-vision"))
    before = describe(model)
    with pytest.raises(ValueError, match="already adapted"):
        moram.inject(model, small_config(targets="open_clip"))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("gpt2", None, "model must be an nn.Module, got str"),
        (nn.Linear(2, 2), {"top_k": 2}, "config must be a MoRAMConfig, got dict"),
    ],
    ids=["model", "config"],
)
def test_wrong_kind_of_argument_is_named(model, config, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        moram.inject(model, config)
