"""Backbones that a run cannot learn with are refused before any training, and why is said."""

import json

import pytest
import torch
from xtail_support import (
    MODEL,
    NAMES,
    TAKEN,
    quick,
    run,
    settings_for,
    tiny_clip,
    tokenize,
    write_backbone,
    write_domains,
)

from moram.cli import main
from moram.methods.train import TaskTrainer
from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.run import run_xtail


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    """Nothing is trained in this test, and the folder stays free."""

    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(TaskTrainer, "run", fail)
    yield
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def refused(whole, untrained, tmp_path, capsys):
    """Run `moram xtail` with a backbone; what it says."""
    own = write_backbone(tmp_path / "own")

    def call(backbone=own, **changes):
        given = quick(whole, tmp_path / "out", backbone=backbone, **changes)
        given["datasets"] = ",".join(NAMES)
        sets = [part for k, v in given.items() for part in ("--set", f"{k}={json.dumps(v)}")]
        capsys.readouterr()
        assert main(["xtail", *sets]) == 1
        # Libraries may log before it.
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("moram xtail: ")
        return line.removeprefix("moram xtail: ")

    return call


def test_a_backbone_that_does_not_exist(refused, tmp_path):
    line = refused(backbone="ViT-B-17")
    assert line.startswith("backbone must be a model of open_clip") and "'ViT-B-17'" in line
    assert "/nowhere/clip" in refused(backbone="/nowhere/clip")
    assert str(tmp_path / "no") in refused(backbone=f"local-dir:{tmp_path / 'no'}")


def test_a_tag_of_weights_that_does_not_exist(refused):
    line = refused(backbone="ViT-B-16", pretrained="opanai")
    assert line.startswith("pretrained must be random, a file, or a tag of ViT-B-16 (openai, ")
    assert line.endswith("got 'opanai'")


def test_a_file_of_weights_that_does_not_fit_or_is_none(refused, tmp_path):
    import open_clip

    # A small model under a name of open_clip's own.
    (tmp_path / "configs").mkdir()
    text = MODEL["text_cfg"] | {"vocab_size": 49408}
    config = json.dumps(MODEL | {"text_cfg": text})
    (tmp_path / "configs" / "tiny-test.json").write_text(config)
    registry = dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(tmp_path / "configs")
    try:
        file = tmp_path / "other.pt"
        torch.save({"visual.conv1.weight": torch.zeros(3)}, file)
        line = refused(backbone="tiny-test", pretrained=str(file))
        assert line.startswith(f"the weights {file} do not fit tiny-test: ")
        file.write_bytes(b"half a file")
        line = refused(backbone="tiny-test", pretrained=str(file))
        assert line.startswith(f"the weights {file} cannot be read: ")
    finally:
        open_clip.factory._MODEL_CONFIGS.clear()
        open_clip.factory._MODEL_CONFIGS.update(registry)


def resnet_clip():
    """A CLIP whose image encoder is a tiny ResNet, whose only attention pools."""
    import open_clip

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, MODEL["text_cfg"]).eval()
    return Clip(model, tokenize, Preprocess(32, MEAN, STD))


def refusal(whole, out, method, clip, **changes):
    """What a run says that refuses a backbone."""
    with pytest.raises(ValueError) as error:
        run(whole, out, method, clip=clip, **changes)
    return str(error.value)


WITHOUT_TARGETS = ("zero-shot", "rail-primal", "rail-dual", "moe-adapters", "lada")
ADAPTED = [m for m in TAKEN if m not in WITHOUT_TARGETS]


@pytest.mark.parametrize("method", ADAPTED)
def test_an_image_encoder_without_transformer_is_refused(whole, tmp_path, untrained, method):
    line = refusal(whole, tmp_path / "out", method, resnet_clip())
    assert "got none in visual (ModifiedResNet)" in line


def test_moe_adapters_refuse_an_image_encoder_without_transformer(whole, tmp_path, untrained):
    line = refusal(whole, tmp_path / "out", "moe-adapters", resnet_clip())
    assert line.endswith("CLIP has none in its image encoder")


def test_lada_refuses_an_image_encoder_that_training_would_change(whole, tmp_path, untrained):
    line = refusal(whole, tmp_path / "out", "lada", resnet_clip())
    assert "has batch normalisation in its image encoder" in line


@pytest.mark.parametrize("method", ADAPTED)
def test_targets_of_an_encoder_without_transformer_match_nothing(
    whole, tmp_path, untrained, method
):
    line = refusal(whole, tmp_path / "out", method, resnet_clip(), targets="open_clip-vision")
    assert line.startswith("target 'attn.q_proj' matches no module of CLIP; ")


@pytest.mark.parametrize("method", ["zero-shot", "rail-primal", "rail-dual"])
def test_methods_that_adapt_nothing_take_any_image_encoder(whole, tmp_path, method):
    assert run(whole, tmp_path / "out", method, clip=resnet_clip())["complete"]


def unsplittable_clip():
    clip = tiny_clip()
    for block in clip.model.visual.transformer.resblocks:
        block.attn = torch.nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)
    return clip


@pytest.mark.parametrize("method", ADAPTED)
def test_attention_that_cannot_be_split_is_named(whole, tmp_path, untrained, method):
    line = refusal(whole, tmp_path / "out", method, unsplittable_clip())
    assert "visual.transformer.resblocks.0.attn" in line


def test_attention_that_cannot_be_split_is_refused_with_the_reason(whole, tmp_path, untrained):
    line = refusal(whole, tmp_path / "out", "moram", unsplittable_clip())
    assert "add_bias_kv" in line and "use an open_clip preset" not in line


@pytest.mark.parametrize("targets", [["z_proj"], "clip", "clipp"])
def test_targets_that_the_model_lacks(refused, targets):
    # A text is a preset, or else names of projections.
    expected = {"clipp": "target 'clipp' matches no module", "clip": "matches no module"}
    key = targets if isinstance(targets, str) else ""
    assert expected.get(key, "'z_proj' matches no module") in refused(targets=targets)


def test_random_weights_are_those_of_the_seed(whole, tmp_path):
    folder = write_backbone(tmp_path / "clip")
    losses = []
    for out in ("one", "other"):
        settings = settings_for(whole, tmp_path / out, "lora", backbone=folder, pretrained="random")
        torch.manual_seed(len(losses))
        run_xtail(settings, log=lambda line: None)
        losses.append((tmp_path / out / "steps.csv").read_text().splitlines())
    assert [row.rsplit(",", 1)[0] for row in losses[0]] == [
        row.rsplit(",", 1)[0] for row in losses[1]
    ]
