"""Split attention against nn.MultiheadAttention, alone and inside an open_clip model."""

import copy
import re

import pytest
import torch
from tiny_models import (
    assert_untouched,
    describe,
    fill_values,
    images,
    open_clip_model,
    small_config,
    token_ids,
)
from torch import nn

import moram
from moram.models import SplitAttention, pack_attention, split_attention

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 7


def attention(seed=0, **changes):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(WIDTH, HEADS, **changes)
    # PyTorch starts these at zero, which would hide a mix-up.
    with torch.no_grad():
        for bias in (module.in_proj_bias, module.out_proj.bias):
            if bias is not None:
                bias.normal_()
    return module


def qkv(batch_first):
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(BATCH, n, WIDTH, generator=generator) for n in (QUERIES, KEYS, KEYS)]
    if not batch_first:
        tensors = [t.transpose(0, 1).contiguous() for t in tensors]
    return [t.requires_grad_() for t in tensors]


def some_mask(*shape, kind):
    """A random mask that hides about a third, never a whole row."""
    hidden = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.35
    hidden[..., 0] = False
    assert hidden.any()
    return hidden if kind == "bool" else torch.randn(shape).masked_fill_(hidden, float("-inf"))


MASKS = {
    "none": lambda: {},
    "float": lambda: {"attn_mask": some_mask(QUERIES, KEYS, kind="float")},
    "bool": lambda: {"attn_mask": some_mask(QUERIES, KEYS, kind="bool")},
    "float3d": lambda: {"attn_mask": some_mask(BATCH * HEADS, QUERIES, KEYS, kind="float")},
    "bool3d": lambda: {"attn_mask": some_mask(BATCH * HEADS, QUERIES, KEYS, kind="bool")},
    "padding": lambda: {"key_padding_mask": some_mask(BATCH, KEYS, kind="bool")},
    "float_padding": lambda: {"key_padding_mask": some_mask(BATCH, KEYS, kind="float")},
    "both": lambda: {
        "attn_mask": some_mask(QUERIES, KEYS, kind="bool"),
        "key_padding_mask": some_mask(BATCH, KEYS, kind="bool"),
    },
    "causal": lambda: {
        "attn_mask": torch.triu(torch.ones(QUERIES, KEYS, dtype=torch.bool), 1),
        "is_causal": True,
    },
}


def assert_equal_attention(packed, inputs, masks):
    split = SplitAttention(packed)
    expected, _ = packed(*inputs, need_weights=False, **masks)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    expected_grads = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
    output, weights = split(*inputs, **masks)
    assert weights is None
    torch.testing.assert_close(output, expected)
    for actual, wanted in zip(
        torch.autograd.grad(output, inputs, grad), expected_grads, strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "batch_second"])
@pytest.mark.parametrize("mask", MASKS)
def test_split_attention_equals_multihead_attention(mask, batch_first):
    assert_equal_attention(attention(batch_first=batch_first), qkv(batch_first), MASKS[mask]())


def test_attention_without_bias_equals_multihead_attention():
    packed = attention(bias=False)
    assert SplitAttention(packed).q_proj.bias is None
    assert_equal_attention(packed, qkv(False), {})


UNBATCHED_MASKS = {
    "none": lambda: {},
    "bool": lambda: {"attn_mask": some_mask(QUERIES, KEYS, kind="bool")},
    "bool3d": lambda: {"attn_mask": some_mask(HEADS, QUERIES, KEYS, kind="bool")},
    "padding": lambda: {"key_padding_mask": some_mask(KEYS, kind="bool")},
}


@pytest.mark.parametrize("mask", UNBATCHED_MASKS)
def test_unbatched_split_attention_equals_multihead_attention(mask):
    inputs = [t[0].detach().requires_grad_() for t in qkv(True)]
    assert_equal_attention(attention(batch_first=True), inputs, UNBATCHED_MASKS[mask]())


def test_parameter_gradients_equal_those_of_multihead_attention():
    packed = attention(batch_first=True)
    split = SplitAttention(packed)
    inputs = qkv(True)
    for module in (packed, split):
        module(*inputs, need_weights=False)[0].square().sum().backward()
    parts = (split.q_proj, split.k_proj, split.v_proj)
    weight = torch.cat([p.weight.grad for p in parts])
    bias = torch.cat([p.bias.grad for p in parts])
    # Up to rounding: sums over 10 rows of numbers of size 10.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(weight, packed.in_proj_weight.grad, **close)
    torch.testing.assert_close(bias, packed.in_proj_bias.grad, **close)
    torch.testing.assert_close(split.out_proj.weight.grad, packed.out_proj.weight.grad, **close)


def test_attention_dropout_acts_in_training_alone():
    packed = attention(batch_first=True, dropout=0.5).eval()
    split, inputs = SplitAttention(packed), qkv(True)
    assert not split.training
    torch.testing.assert_close(split(*inputs)[0], packed(*inputs, need_weights=False)[0])
    split.train()
    assert not torch.equal(split(*inputs)[0], split(*inputs)[0])


def test_attention_weights_are_refused():
    message = "need_weights must be False: split attention returns no weights"
    with pytest.raises(ValueError, match=message):
        SplitAttention(attention())(*qkv(False), need_weights=True)


def test_causal_hint_without_a_mask_is_refused_as_by_multihead_attention():
    packed, inputs = attention(), qkv(False)
    with pytest.raises(RuntimeError, match="attn_mask"):
        packed(*inputs, need_weights=False, is_causal=True)
    with pytest.raises((RuntimeError, ValueError), match="attn_mask"):
        SplitAttention(packed)(*inputs, is_causal=True)


UNSPLITTABLE = {
    "kdim": ({"kdim": 8}, "its keys or values have a width of their own (kdim, vdim)"),
    "vdim": ({"vdim": 8}, "its keys or values have a width of their own (kdim, vdim)"),
    "bias_kv": (
        {"add_bias_kv": True},
        "it appends to keys and values (add_bias_kv, add_zero_attn)",
    ),
    "zero_attn": (
        {"add_zero_attn": True},
        "it appends to keys and values (add_bias_kv, add_zero_attn)",
    ),
}


@pytest.mark.parametrize("case", UNSPLITTABLE)
def test_other_forms_of_attention_are_refused_and_left_alone(case):
    changes, reason = UNSPLITTABLE[case]
    packed = attention(**changes)
    message = f"this nn.MultiheadAttention cannot be split: {reason}"
    with pytest.raises(ValueError, match=re.escape(message)):
        SplitAttention(packed)
    model = nn.ModuleDict({"odd": packed, "plain": attention()})
    assert split_attention(model) == ["plain"]
    assert model["odd"] is packed
    assert isinstance(model["plain"], SplitAttention)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_split_and_pack_restore_the_model_bit_for_bit(training, trainable):
    model = open_clip_model().train(training).requires_grad_(trainable)
    before = describe(model)
    paths = [f"{t}.resblocks.{i}.attn" for t in ("visual.transformer", "transformer") for i in "01"]
    assert split_attention(model) == paths
    assert not any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    assert {p.requires_grad for p in model.parameters()} == {trainable}
    assert {m.training for m in model.modules()} == {training}
    assert pack_attention(model) == paths
    assert_untouched(model, before)


def test_packed_attention_keeps_every_setting():
    packed = attention(dropout=0.25, batch_first=True, bias=False).to(torch.bfloat16)
    model = nn.ModuleDict({"attn": packed})
    split_attention(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    pack_attention(model)
    again = model["attn"]
    assert (again.dropout, again.batch_first, again.num_heads) == (0.25, True, HEADS)
    assert again.in_proj_bias is None and again.in_proj_weight.dtype == torch.bfloat16


def test_packing_adapted_projections_is_refused():
    model = open_clip_model()
    moram.inject(model, small_config())
    before = describe(model)
    message = (
        "visual.transformer.resblocks.0.attn.q_proj is a MoRAMLinear, which cannot be packed; "
        "call moram.eject(model) first"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_attention(model)
    assert_untouched(model, before)


def test_inject_eject_pack_restores_open_clips_state_dict():
    model = open_clip_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moram.inject(model, small_config())
    moram.eject(model)
    pack_attention(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_split_attention_swaps_below_the_prefixes_alone():
    model = open_clip_model()
    paths = split_attention(model, ("visual.",))
    assert paths == [f"visual.transformer.resblocks.{i}.attn" for i in "01"]


def test_shared_attention_is_split_at_both_paths():
    model = nn.ModuleDict({"first": attention()})
    model["again"] = model["first"]
    split_attention(model)
    assert isinstance(model["first"], SplitAttention)
    assert model["again"] is model["first"]


def test_encoders_are_the_same_before_and_after_the_split():
    model = open_clip_model()
    image, text = model.encode_image(images()), model.encode_text(token_ids(2, 8))
    split_attention(model)
    torch.testing.assert_close(model.encode_image(images()), image)
    torch.testing.assert_close(model.encode_text(token_ids(2, 8)), text)


def contrast(model):
    image, text = model.encode_image(images()), model.encode_text(token_ids(2, 8))
    return (image @ text.T).square().sum()


def test_open_clip_gradient_checkpointing_gives_the_same_gradients():
    model = open_clip_model()
    moram.inject(model, small_config())
    fill_values(model)
    moram.grow(model)
    fill_values(model, 1)
    model.train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    calls = []
    layer = again.visual.transformer.resblocks[0].mlp.c_fc
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    contrast(model).backward()
    contrast(again).backward()
    assert len(calls) == 2, "the layer must have been computed again"
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 48
    for name, parameter in again.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_open_clip_reads_its_cast_dtype_through_adapters(dtype):
    model = open_clip_model().to(dtype)
    moram.inject(model, small_config())
    assert model.transformer.get_cast_dtype() == dtype
    assert model.visual.transformer.get_cast_dtype() == dtype
    assert model.encode_text(token_ids(2, 8)).dtype == dtype
    assert model.encode_image(images().to(dtype)).dtype == dtype
