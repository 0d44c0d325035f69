"""Weights that a model reads and never calls: refused where known, reported where not."""

import re
import warnings

import pytest
import torch
from tiny_models import (
    Mlp,
    assert_untouched,
    describe,
    fill_values,
    hf_clip,
    open_clip_model,
    small_config,
    token_ids,
)
from torch import nn

import moram
from moram import adapters
from moram.inject import inject_with, uncalled
from moram.layers import (
    CoDyRALinear,
    LoRALinear,
    MoELoRALinear,
    RankPoolLinear,
    StackedLoRALinear,
)
from moram.layers.adaptformer import AdaptFormerMLP
from moram.layers.moe_adapters import MoEAdapterMLP
from moram.models import pack_attention, split_attention

LAYER_TEXT = (
    "nn.TransformerEncoderLayer reads its weight in eval mode and calls it in training alone; call "
    "moram.models.split_attention(model) first, which ends that"
)


def encoder(layers=1):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=64)
    return MambaForCausalLM(config).eval()


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,)}
    more = {
        "intermediate_size": 32,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    return WavLMModel(WavLMConfig(**sizes, **convolutions, **more)).eval()


def resnet_clip():
    return open_clip_model(layers=[1, 1, 1, 1], patch_size=None, image_size=32, head_width=16)


REFUSED = {
    "first": (encoder, "linear1", f"layers.0.linear1: {LAYER_TEXT}"),
    "second": (encoder, "linear2", f"layers.0.linear2: {LAYER_TEXT}"),
    "mamba": (
        mamba,
        "dt_proj",
        "backbone.layers.0.mixer.dt_proj: MambaMixer reads its weight always and does not call it "
        "there, so an adapter would do nothing; leave it out of targets, or exclude it",
    ),
    "mamba fused": (
        mamba,
        "out_proj",
        "backbone.layers.0.mixer.out_proj: MambaMixer reads its weight in its fused kernels and "
        "does not call it there, so an adapter would do nothing; leave it out of targets, or "
        "exclude it",
    ),
    "wavlm": (
        wavlm,
        "q_proj",
        "encoder.layers.0.attention.q_proj: WavLMAttention reads its weight always and does not "
        "call it there, so an adapter would do nothing; leave it out of targets, or exclude it",
    ),
    "resnet": (
        resnet_clip,
        "attnpool.c_proj",
        "visual.attnpool.c_proj: AttentionPool2d reads its weight always and does not call it "
        "there, so an adapter would do nothing; leave it out of targets, or exclude it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_known_reader_is_refused_and_the_model_untouched(case):
    build, target, message = REFUSED[case]
    model = build()
    before = describe(model)
    text = f"target {target!r} matches {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        moram.inject(model, small_config(targets=(target,)))
    assert_untouched(model, before)


@pytest.mark.parametrize("mask", [None, "causal", "padding"])
def test_split_attention_makes_an_encoder_layer_call_its_linears(mask):
    model, x = encoder(2), torch.randn(3, 5, 32)
    given = {}
    if mask == "causal":
        given = {"mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
    if mask == "padding":
        given = {"src_key_padding_mask": torch.arange(5).expand(3, 5) >= 4}
    with torch.no_grad():
        packed = model(x, **given)
        split_attention(model)
        kept = slice(0, 4) if mask == "padding" else slice(None)
        # The padding's outputs mean nothing; the packed form sets them to zero.
        torch.testing.assert_close(model(x, **given)[:, kept], packed[:, kept])
        moram.inject(model, small_config(targets=("linear1", "linear2", "q_proj")))
        before = model(x, **given)
        fill_values(model)
        assert not torch.allclose(model(x, **given), before, atol=1e-3)
        # Both modes compute the same now.
        torch.testing.assert_close(model.train()(x, **given), model.eval()(x, **given))
    moram.eject(model)
    pack_attention(model)
    with torch.no_grad():
        assert torch.equal(model(x, **given), packed)
    assert model.use_nested_tensor


def test_an_adapted_encoder_layer_is_not_packed_under_its_adapters():
    model = encoder()
    split_attention(model)
    moram.inject(model, small_config(targets=("linear1",)))
    message = (
        "layers.0.linear1 is a MoRAMLinear, which cannot be packed; call moram.eject(model) first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack_attention(model)


def test_a_checkpoint_of_an_encoder_layer_splits_the_attention_beside_it(tmp_path):
    model, x = encoder(), torch.randn(2, 5, 32)
    split_attention(model)
    moram.inject(model, small_config(targets=("linear1", "linear2")))
    fill_values(model)
    moram.save(model, tmp_path)
    fresh = encoder()
    moram.load(fresh, tmp_path)
    with torch.no_grad():
        assert not torch.allclose(model(x), encoder()(x), atol=1e-2)
        torch.testing.assert_close(fresh(x), model(x))


def smooth(x):
    return torch.tanh(x)


NO_FAST_PATH = [
    {"batch_first": False},
    {"bias": False},
    {"activation": smooth},
    {"nhead": 1},
]


@pytest.mark.parametrize("settings", NO_FAST_PATH, ids=lambda settings: next(iter(settings)))
def test_an_encoder_layer_without_a_fast_path_is_adapted(settings):
    settings = {"nhead": 4, "batch_first": True, "dropout": 0.0} | settings
    model = nn.TransformerEncoderLayer(32, **settings).eval()
    model, x = nn.ModuleDict({"layer": model}), torch.randn(3, 5, 32)
    moram.inject(model, small_config(targets=("linear1", "linear2")))
    with torch.no_grad():
        before = model["layer"](x)
        fill_values(model)
        assert not torch.allclose(model["layer"](x), before, atol=1e-3)


def test_packing_leaves_an_encoder_that_used_no_nested_tensors_as_it_was():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, batch_first=True), 1, enable_nested_tensor=False
    )
    split_attention(model)
    pack_attention(model)
    assert not model.use_nested_tensor


class Reader(nn.Module):
    """Calls two of its three Linears and reads the weight of the third."""

    def __init__(self):
        super().__init__()
        self.up, self.read, self.down = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) @ self.read.weight.T)


TARGETS = ("up", "read", "down")
REPORT = (
    "no call reached these adapters although the model was called, so they learn and change "
    "nothing: read; if the model reads their weight instead, leave them out with exclude"
)


@pytest.mark.parametrize("when", ["grow", "save"])
def test_an_adapter_that_nothing_calls_is_reported(tmp_path, when):
    model = Reader()
    moram.inject(model, small_config(targets=TARGETS))
    model(torch.randn(2, 8))
    act = moram.grow if when == "grow" else lambda m: moram.save(m, tmp_path)
    with pytest.warns(UserWarning, match=f"^{re.escape(REPORT)}$"):
        act(model)


def test_a_model_that_calls_no_adapter_at_all_is_reported_by_a_head_that_learned():
    model = nn.ModuleDict({"read": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    moram.inject(model, small_config(targets=("read",)))
    model["head"].requires_grad_(True)
    model["head"](torch.randn(2, 8) @ model["read"].weight).sum().backward()
    with pytest.warns(UserWarning, match="no call reached these adapters .* nothing: read;"):
        moram.grow(model)


def test_adapters_that_nothing_could_have_called_yet_are_not_reported():
    model = Mlp()
    moram.inject(model, small_config(targets=("up",)))
    model(torch.randn(2, 8))
    moram.inject(model, small_config(targets=("down",)))
    assert uncalled(model) == ()


@pytest.mark.parametrize("when", ["grow", "save"])
@pytest.mark.parametrize("called", ["all", "none", "compiled"])
def test_no_adapter_is_reported_without_reason(tmp_path, when, called):
    model = Mlp()
    moram.inject(model, small_config(targets=("up", "down")))
    if called == "all":
        model(torch.randn(2, 8))
    if called == "compiled":
        torch.compile(model.up, backend="aot_eager")(torch.randn(2, 8))
        model.down(torch.randn(2, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moram.grow(model) if when == "grow" else moram.save(model, tmp_path)
    assert uncalled(model) == ()


KINDS = {
    LoRALinear: lambda linear: LoRALinear(linear, 2),
    StackedLoRALinear: lambda linear: StackedLoRALinear(linear, 2),
    CoDyRALinear: lambda linear: CoDyRALinear(linear, 2),
    MoELoRALinear: lambda linear: MoELoRALinear(linear, 2),
    RankPoolLinear: lambda linear: RankPoolLinear(linear, 2, active=1),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_adapter_notes_its_calls(kind):
    model = Reader()
    inject_with(model, TARGETS, (), KINDS[kind])
    assert uncalled(model) == ()
    model(torch.randn(2, 8))
    assert uncalled(model) == ("read",)


@pytest.mark.parametrize("kind", [MoEAdapterMLP, AdaptFormerMLP])
def test_what_stands_beside_an_mlp_notes_its_calls(kind):
    model = nn.Sequential(Mlp(), Mlp())
    model[0], model[1] = kind(model[0], 8), kind(model[1], 8)
    model[0](torch.randn(2, 3, 8))
    assert uncalled(model) == ("1",)


def test_clip_towers_that_are_called_are_not_reported():
    model = hf_clip()
    moram.inject(model, small_config())
    images = torch.randn(2, 3, 32, 32)
    model(input_ids=token_ids(length=6), pixel_values=images)
    assert adapters(model) and uncalled(model) == ()
