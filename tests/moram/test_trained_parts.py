"""What else of a model was trained is saved and loaded with its adapters."""

import json
import re

import pytest
import torch
from tiny_models import (
    CONFIG,
    Mlp,
    assert_untouched,
    describe,
    fill_values,
    language_model,
    small_config,
    token_ids,
    trained_mlp,
)
from torch import nn

import moram
from moram.models.heads import fresh_heads

IDS = token_ids()


def classifier(seed=0):
    """A Llama with a classification head; the base is the same for every seed, the head is not."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    torch.manual_seed(100 + seed)
    nn.init.normal_(model.score.weight, std=0.02)
    return model


@pytest.fixture
def trained():
    """A classifier whose head was unfrozen and trained."""
    model = classifier()
    with pytest.warns(UserWarning, match="inject froze what looks freshly initialised: score;"):
        moram.inject(model, small_config())
    fill_values(model)
    model.score.requires_grad_(True)
    with torch.no_grad():
        model.score.weight.normal_()
    return model


@torch.no_grad()
def answers(model):
    return model(IDS).logits


@pytest.mark.parametrize("into", ["plain", "injected"])
def test_a_trained_head_is_saved_and_loaded(tmp_path, trained, into):
    moram.save(trained, tmp_path)
    fresh = classifier(seed=1)
    if into == "injected":
        with pytest.warns(UserWarning, match="freshly initialised"):
            moram.inject(fresh, small_config())
    about = moram.load(fresh, tmp_path)
    assert about["trained"] == {"score.weight": [3, 32]}
    assert torch.equal(answers(fresh), answers(trained))
    learns = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in trained.named_parameters() if p.requires_grad}
    # So a second round keeps it, too.
    moram.save(fresh, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["trained"] == about["trained"]


def test_what_is_frozen_is_not_saved(tmp_path):
    model = language_model()
    moram.inject(model, small_config())
    moram.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["trained"] == {}


def test_resized_embeddings_are_saved_and_must_be_resized_again(tmp_path):
    def resized():
        model = language_model(tie_word_embeddings=False)
        torch.manual_seed(7)
        model.resize_token_embeddings(70)
        return model

    model = resized()
    moram.inject(model, small_config())
    fill_values(model)
    model.get_input_embeddings().requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight[64:].normal_()
    moram.save(model, tmp_path)
    fresh = resized()
    moram.load(fresh, tmp_path)
    assert torch.equal(answers(fresh), answers(model))
    small = language_model(tie_word_embeddings=False)
    before = describe(small)
    message = (
        "model.embed_tokens.weight must be (70, 32), as it was trained with the checkpoint, got "
        "(64, 32); embeddings that were resized for it must be here, too "
        "(model.resize_token_embeddings)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.load(small, tmp_path)
    assert_untouched(small, before)


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model = language_model(tie_word_embeddings=True)
    moram.inject(model, small_config())
    model.get_input_embeddings().requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    moram.save(model, tmp_path)
    fresh = language_model(tie_word_embeddings=True)
    about = moram.load(fresh, tmp_path)
    assert list(about["trained"]) == ["model.embed_tokens.weight"]
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(answers(fresh), answers(model))


class Normed(nn.Module):
    """A projection and a norm with running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(8, 12), nn.BatchNorm1d(12)

    def forward(self, x):
        return self.norm(self.up(x))


def test_a_trained_norm_keeps_its_statistics(tmp_path):
    model, x = Normed(), torch.randn(16, 8)
    moram.inject(model, small_config(targets=("up",)))
    fill_values(model)
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.normal_()
        model.train()(x)
    moram.save(model.eval(), tmp_path)
    fresh = Normed().eval()
    moram.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_a_trained_base_weight_is_saved(tmp_path):
    model, x = trained_mlp(), torch.randn(4, 8)
    model.up.base_layer.bias.requires_grad_(True)
    with torch.no_grad():
        model.up.base_layer.bias.normal_()
    moram.save(model, tmp_path)
    fresh = Mlp().eval()
    assert list(moram.load(fresh, tmp_path)["trained"]) == ["up.bias"]
    assert torch.equal(fresh(x), model(x))


def test_a_trained_base_weight_is_no_sign_of_another_base(tmp_path):
    model, x = trained_mlp(), torch.randn(4, 8)
    model.up.base_layer.weight.requires_grad_(True)
    with torch.no_grad():
        model.up.base_layer.weight.normal_()
    moram.save(model, tmp_path)
    fresh = Mlp().eval()
    moram.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_statistics_that_a_frozen_norm_gathered_are_saved(tmp_path):
    model, x = Normed(), torch.randn(16, 8) * 3 + 2
    moram.inject(model, small_config(targets=("up",)))
    with torch.no_grad():
        model.train()(x)
    model.eval()
    moram.save(model, tmp_path)
    fresh = Normed().eval()
    moram.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert not fresh.norm.weight.requires_grad


@pytest.mark.parametrize("known", ["loaded", "grown"])
def test_a_trained_head_stays_part_of_the_checkpoint_when_it_is_frozen(tmp_path, trained, known):
    model = trained
    if known == "loaded":
        moram.save(trained, tmp_path)
        model = classifier(seed=1)
        moram.load(model, tmp_path)
    else:
        moram.grow(model)
    model.requires_grad_(False)
    moram.save(model, tmp_path / "again")
    fresh = classifier(seed=2)
    moram.load(fresh, tmp_path / "again")
    assert torch.equal(answers(fresh), answers(model))


def test_a_trained_tensor_of_any_layout_is_saved(tmp_path):
    model = trained_mlp()
    model.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    moram.save(model, tmp_path)
    fresh = Mlp()
    fresh.conv = nn.Conv2d(3, 8, 3)
    moram.load(fresh, tmp_path)
    assert torch.equal(fresh.conv.weight, model.conv.weight)


def test_the_files_of_another_adapter_are_not_overwritten(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    message = (
        f"directory must hold no adapter of another kind, got {tmp_path}, whose {CONFIG} is not "
        "MoRAM's: saving would overwrite it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.save(trained_mlp(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()) == {"peft_type": "LORA"}


def test_a_checkpoint_from_beside_a_peft_adapter_asks_for_that_one(tmp_path):
    model = trained_mlp()
    kind = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model.other = kind(2, 2)
    model.other.requires_grad_(False)
    moram.save(model, tmp_path)
    fresh = Mlp()
    message = (
        "model must hold the PEFT adapter beside which the checkpoint was trained; load that one "
        "first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.load(fresh, tmp_path)
    fresh.other = kind(2, 2)
    moram.load(fresh, tmp_path)


def test_a_model_without_the_trained_tensor_is_refused_and_untouched(tmp_path):
    learner = trained_mlp()
    learner.head = nn.Linear(8, 2)
    moram.save(learner, tmp_path)
    model = Mlp()
    before = describe(model)
    message = "model has no tensor head.weight, which was trained with the checkpoint"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.load(model, tmp_path)
    assert_untouched(model, before)


def test_a_second_injection_keeps_a_trained_head_trainable(trained):
    moram.inject(trained, small_config(targets=("up_proj",)))
    assert trained.score.weight.requires_grad
    assert not trained.model.embed_tokens.weight.requires_grad


def test_only_heads_that_look_as_drawn_are_named():
    model = classifier()
    assert fresh_heads(model) == ("score",)
    assert fresh_heads(model, adapted=[model.score]) == ()
    with torch.no_grad():
        model.score.weight.mul_(2)
    assert fresh_heads(model) == ()
    with torch.no_grad():
        model.score.weight.zero_()
    assert fresh_heads(model) == ("score",)
    # Output embeddings are pretrained, however they look.
    assert fresh_heads(language_model(tie_word_embeddings=False)) == ()


def test_a_head_of_plain_torch_is_recognised_by_name_and_spread():
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 50)})
    assert fresh_heads(model) == ("head",)
    with torch.no_grad():
        model["head"].weight.mul_(0.8)
    assert fresh_heads(model) == ()


def test_the_report_names_a_frozen_fresh_head():
    with pytest.warns(UserWarning, match="freshly initialised: score; to train it, call"):
        report = moram.inject(classifier(), small_config())
    assert report.fresh == ("score",)
    assert "frozen though freshly initialised score" in str(report)
