"""Injection by preset and by name: which modules, what stays trainable, growing and ejecting."""

import pytest
import torch
from tiny_models import (
    fill_values,
    gemma3_multimodal,
    hf_clip,
    images,
    language_model,
    open_clip_model,
    small_config,
    token_ids,
)
from torch import nn

import moram
from moram import MoRAMConfig, MoRAMLinear, adapters

FAMILIES = ("Llama", "Mistral", "Gemma", "Gemma2", "Gemma3", "Qwen2", "Qwen3")
LAYERS = ("layers.0", "layers.1")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CLIP_PARTS = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
OPEN_CLIP_PARTS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.out_proj",
    "mlp.c_fc",
    "mlp.c_proj",
)
VISION = {
    "hf": {f"vision_model.encoder.{i}.{p}" for i in LAYERS for p in CLIP_PARTS},
    "open": {f"visual.transformer.resblocks.{i}.{p}" for i in "01" for p in OPEN_CLIP_PARTS},
}
TEXT = {
    "hf": {f"text_model.encoder.{i}.{p}" for i in LAYERS for p in CLIP_PARTS},
    "open": {f"transformer.resblocks.{i}.{p}" for i in "01" for p in OPEN_CLIP_PARTS},
}


def clip_outputs(model):
    """Image and text features of either kind of CLIP."""
    if hasattr(model, "encode_image"):
        return torch.cat([model.encode_image(images()), model.encode_text(token_ids(2, 8))])
    output = model(input_ids=token_ids(2, 8), pixel_values=images())
    return torch.cat([output.image_embeds, output.text_embeds])


def assert_only_atoms_train(model, paths):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("current_keys", "current_values")
    assert trainable == {f"{path}.bank.{part}" for path in paths for part in parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_language_preset_adapts_attention(family):
    model = language_model(family)
    ids = token_ids()
    before = model(ids).logits
    report = moram.inject(model, small_config())
    paths = {f"model.{i}.self_attn.{name}" for i in LAYERS for name in ATTENTION}
    assert set(report.paths) == set(adapters(model)) == paths
    assert report.matches == dict.fromkeys(ATTENTION, 2)
    # 4 atoms, keys of 32 each; values 32 for q and o, 16 for k and v; two layers.
    assert report.num_trainable == 2 * 4 * (4 * 32 + 32 + 16 + 16 + 32)
    assert_only_atoms_train(model, paths)
    assert torch.equal(model(ids).logits, before)


def test_language_preset_with_mlp_adapts_seven_projections_a_layer():
    model = language_model("Qwen3")
    report = moram.inject(model, small_config(targets="qwen3+mlp"))
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert set(report.paths) == {
        *(f"model.{i}.self_attn.{name}" for i in LAYERS for name in ATTENTION),
        *(f"model.{i}.mlp.{name}" for i in LAYERS for name in mlp),
    }
    assert report.matches == dict.fromkeys(ATTENTION + mlp, 2)


@pytest.mark.parametrize("targets", ["auto", "gemma3", "gemma3+mlp"])
def test_multimodal_gemma3_leaves_the_vision_tower_alone(targets):
    model = gemma3_multimodal()
    ids = token_ids()
    before = model(ids).logits
    report = moram.inject(model, small_config(targets=targets))
    names = [f"self_attn.{n}" for n in ATTENTION]
    if targets == "gemma3+mlp":
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert set(report.paths) == {f"model.language_model.{i}.{n}" for i in LAYERS for n in names}
    assert not any(isinstance(m, MoRAMLinear) for m in model.model.vision_tower.modules())
    assert_only_atoms_train(model, report.paths)
    assert torch.equal(model(ids).logits, before)


CLIP_CASES = {
    "clip": (hf_clip, VISION["hf"] | TEXT["hf"]),
    "clip-vision": (hf_clip, VISION["hf"]),
    "clip-text": (hf_clip, TEXT["hf"]),
    "open_clip": (open_clip_model, VISION["open"] | TEXT["open"]),
    "open_clip-vision": (open_clip_model, VISION["open"]),
    "open_clip-text": (open_clip_model, TEXT["open"]),
}


@pytest.mark.parametrize("preset", CLIP_CASES)
def test_clip_preset_adapts_its_towers(preset):
    build, paths = CLIP_CASES[preset]
    model = build()
    before = clip_outputs(model)
    report = moram.inject(model, small_config(targets=preset))
    assert set(report.paths) == paths
    assert len(report.matches) == 6
    assert set(report.matches.values()) == {len(paths) // 6}
    assert_only_atoms_train(model, paths)
    torch.testing.assert_close(clip_outputs(model), before, rtol=1e-5, atol=1e-6)
    fill_values(model)
    changed = (clip_outputs(model) - before).abs().amax(-1) > 1e-3
    vision, text = not preset.endswith("-text"), not preset.endswith("-vision")
    assert changed.tolist() == [vision, vision, text, text]


@pytest.mark.parametrize("preset", ["open_clip-vision", "open_clip-text"])
def test_open_clip_attention_of_the_other_tower_stays_packed(preset):
    model = open_clip_model()
    moram.inject(model, small_config(targets=preset))
    packed = {p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    other = "transformer" if preset == "open_clip-vision" else "visual.transformer"
    assert packed == {f"{other}.resblocks.{i}.attn" for i in "01"}


@pytest.mark.parametrize("build", [hf_clip, open_clip_model], ids=["clip", "open_clip"])
def test_auto_finds_the_clip_preset(build):
    model = build()
    report = moram.inject(model, small_config())
    kind = "hf" if build is hf_clip else "open"
    assert set(report.paths) == VISION[kind] | TEXT[kind]


def test_open_clip_with_a_text_tower_of_its_own_is_adapted_in_both():
    model = open_clip_model("CustomTextCLIP")
    before = clip_outputs(model)
    report = moram.inject(model, small_config())
    text = {f"text.{path}" for path in TEXT["open"]}
    assert set(report.paths) == VISION["open"] | text
    torch.testing.assert_close(clip_outputs(model), before, rtol=1e-5, atol=1e-6)


def test_open_clip_attention_pool_is_left_alone():
    """CoCa and others pool with an attention of two widths, which cannot be split."""
    model = open_clip_model(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    report = moram.inject(model, small_config())
    assert set(report.paths) == VISION["open"] | TEXT["open"]


def test_one_clip_tower_alone_is_known_to_auto():
    model = hf_clip().vision_model
    paths = {path.removeprefix("vision_model.") for path in VISION["hf"]}
    assert model.config.model_type == "clip_vision_model"
    assert set(moram.inject(model, small_config()).paths) == paths


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("layers.1.self_attn.q_proj",), {"model.layers.1.self_attn.q_proj"}),
        (("*.0.mlp.*_proj",), {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        (("q_proj", "*.q_proj"), {f"model.{i}.self_attn.q_proj" for i in LAYERS}),
        (("model.layers.0.mlp.up_proj",), {"model.layers.0.mlp.up_proj"}),
    ],
    ids=["suffix", "pattern", "overlap", "full"],
)
def test_targets_are_suffixes_of_whole_names_or_patterns(targets, paths):
    model = language_model()
    report = moram.inject(model, small_config(targets=targets))
    assert set(report.paths) == set(adapters(model)) == paths
    assert sum(isinstance(m, MoRAMLinear) for m in model.modules()) == len(paths)


def test_exclude_patterns_are_never_adapted():
    model = language_model()
    config = small_config(targets=("q_proj", "v_proj"), exclude=("model.layers.0.*", "*.1.*v_proj"))
    with pytest.raises(ValueError, match="target 'v_proj' matches no module"):
        moram.inject(model, config)
    config = small_config(targets=("q_proj", "v_proj"), exclude=("*.0.*q_proj", "*.1.*v_proj"))
    assert set(moram.inject(model, config).paths) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    }


def test_exclude_adds_to_what_a_preset_excludes():
    model = gemma3_multimodal()
    report = moram.inject(model, small_config(exclude=("*.layers.1.*",)))
    assert set(report.paths) == {f"model.language_model.layers.0.self_attn.{n}" for n in ATTENTION}


@pytest.mark.parametrize(
    ("exclude", "left", "counts"),
    [
        (
            ("1.self_attn.v_proj",),
            {"q_proj.0", "v_proj.0", "q_proj.1"},
            {"1.self_attn.v_proj": 1},
        ),
        (("layers.0",), {"q_proj.1", "v_proj.1"}, {"layers.0": 2}),
        (("model.layers.1.self_attn",), {"q_proj.0", "v_proj.0"}, {"model.layers.1.self_attn": 2}),
        (("*.0.*.q_proj",), {"v_proj.0", "q_proj.1", "v_proj.1"}, {"*.0.*.q_proj": 1}),
        (("lm_head", "mlp"), {"q_proj.0", "v_proj.0", "q_proj.1", "v_proj.1"}, None),
    ],
    ids=["suffix", "block", "path", "pattern", "no target"],
)
def test_exclude_follows_the_rule_of_targets_and_is_counted(exclude, left, counts):
    model = language_model()
    report = moram.inject(model, small_config(targets=("q_proj", "v_proj"), exclude=exclude))
    found = {f"{path.split('.')[-1]}.{path.split('.')[2]}" for path in report.paths}
    assert found == left
    assert report.excluded == (dict.fromkeys(exclude, 0) if counts is None else counts)
    named = ", ".join(f"{name} {count}" for name, count in report.excluded.items())
    assert f", excluded {named}, " in str(report)


@pytest.mark.parametrize("exclude", ["visual", "visual.*"])
def test_a_tower_that_is_excluded_by_name_is_not_asked_for(exclude):
    model = open_clip_model(layers=[1, 1, 1, 1], patch_size=None, head_width=16)
    report = moram.inject(model, small_config(exclude=(exclude,)))
    assert len(report.paths) == 2 * 6
    assert all(path.startswith("transformer.") for path in report.paths)


def test_base_modules_are_wrapped_and_not_copied():
    model = language_model("Qwen2")
    linear = model.model.layers[0].self_attn.k_proj
    weight, bias = linear.weight, linear.bias
    moram.inject(model, small_config())
    adapter = model.model.layers[0].self_attn.k_proj
    assert adapter.base_layer is linear
    assert adapter.weight is weight and adapter.bias is bias


@pytest.mark.parametrize("build", [language_model, open_clip_model], ids=["llama", "open_clip"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_adapters_take_over_the_mode_of_the_base(training, build):
    model = build().train(training)
    moram.inject(model, small_config())
    assert {path for path, m in model.named_modules() if m.training != training} == set()


def test_equal_generators_give_equal_models():
    keys = []
    for seed in (3, 3, 4):
        model = language_model()
        moram.inject(model, small_config(), generator=torch.Generator().manual_seed(seed))
        keys.append(torch.cat([a.bank.current_keys for a in adapters(model).values()]))
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


def test_report_reads_as_a_sentence():
    report = moram.inject(
        language_model(), small_config(targets=("q_proj", "layers.0.mlp.up_proj"))
    )
    assert str(report) == (
        "3 projections adapted (q_proj 2, layers.0.mlp.up_proj 1), 832 trainable"
    )


class Tied(nn.Module):
    """One Linear used at two paths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.middle = nn.Linear(8, 8)
        self.last = self.first

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def test_a_shared_linear_gets_one_adapter_at_both_paths():
    model = Tied()
    x = torch.randn(3, 8)
    before = model(x)
    report = moram.inject(model, small_config(targets=("first",)))
    assert isinstance(model.first, MoRAMLinear)
    assert model.last is model.first
    assert len(report.paths) == 1 and report.num_trainable == 4 * (8 + 8)
    assert torch.equal(model(x), before)
    moram.eject(model)
    assert type(model.first) is nn.Linear and model.last is model.first


def test_a_shared_linear_is_found_by_its_second_name():
    model = Tied()
    moram.inject(model, small_config(targets=("last",)))
    assert isinstance(model.last, MoRAMLinear)
    assert model.first is model.last


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_eject_restores_the_base_outputs_exactly(family):
    model = language_model(family)
    ids = token_ids()
    before, state = model(ids).logits, list(model.state_dict())
    report = moram.inject(model, small_config())
    fill_values(model)
    moram.grow(model)
    assert not torch.equal(model(ids).logits, before)
    assert set(moram.eject(model)) == set(report.paths)
    assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == state
    assert adapters(model) == {}
    moram.inject(model, MoRAMConfig())


def test_a_second_injection_elsewhere_keeps_the_first_atoms_trainable():
    model = language_model()
    moram.inject(model, small_config(targets=("q_proj",)))
    moram.inject(model, small_config(targets=("v_proj",)))
    paths = {f"model.{i}.self_attn.{name}" for i in LAYERS for name in ("q_proj", "v_proj")}
    assert_only_atoms_train(model, paths)
