"""Presets of `moram xtail`: the published protocol, written out, and that all of them are valid."""

import json
import re

import pytest
from xtail_support import TAKEN

from moram.xtail.plan import XtailPlan
from moram.xtail.settings import XtailSettings, make_settings

# The order of the publication, written out.
TEN = ("aircraft", "caltech101", "dtd", "eurosat", "oxford_flowers", "food101", "mnist")
TEN += ("oxford_pets", "stanford_cars", "sun397")
# Of the published runs: section 3 of the project's notes on the protocol.
PAPER = {
    "backbone": "ViT-B-16",
    "pretrained": "auto",
    "datasets": TEN,
    "shots": 16,
    "rank": 16,
    "lr": 5e-4,
    "betas": (0.9, 0.9999),
    "iterations": 500,
    "batch_size": 64,
    "schedule": "cosine",
    "clip": None,
    "seed": 42,
    "label_smoothing": 0.0,
    "text_loss": True,
    "dropout": 0.0,
    "eval_limit": None,
    "spaces": False,
}


# What has settings of its own paper.
OWN = ("moe-adapters", "dac", "lada")


@pytest.mark.parametrize("method", [m for m in TAKEN if m not in OWN])
def test_the_paper_preset_is_the_published_protocol(method):
    settings = make_settings("paper", method)
    assert {name: getattr(settings, name) for name in PAPER} == PAPER
    training = settings.train_settings("dtd")
    assert training.lr == 5e-4 and training.warmup == 0
    assert training.steps(160) == training.steps(6352) == 500
    assert training.drop_last is False and training.clip is None
    assert training.betas == (0.9, 0.9999)


def test_moe_adapters_learn_by_their_own_papers_loss_in_the_paper_preset():
    settings = make_settings("paper", "moe-adapters")
    own = {"betas": (0.9, 0.999), "text_loss": False, "label_smoothing": 0.2}
    assert {n: getattr(settings, n) for n in PAPER if n != "lr"} == {
        n: value for n, value in (PAPER | own).items() if n != "lr"
    }
    # Its few-shot rates, in the order of the ten.
    rates = [8e-3, 5e-4, 5e-3, 1e-3, 1e-3, 1e-2, 1e-4, 1e-2, 1e-2, 1e-2]
    assert [settings.train_settings(name).lr for name in TEN] == rates
    assert settings.train_settings("dtd").warmup == 100


def test_moe_adapters_learn_by_the_loss_of_all_methods_in_the_small_preset():
    # Label smoothing over a dataset's own classes lets those of others win: see the page.
    moe, lora = (make_settings("small", name) for name in ("moe-adapters", "lora"))
    for name in PAPER:
        if name != "lr":
            assert getattr(moe, name) == getattr(lora, name)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dac", {"rank": 12, "lr": 2e-3, "batch_size": 32, "betas": (0.9, 0.999)}),
        ("lada", {"lr": 1e-3, "betas": (0.9, 0.999)}),
    ],
)
def test_later_methods_have_their_own_papers_rates_in_the_paper_preset(method, own):
    settings = make_settings("paper", method)
    expected = PAPER | own
    assert {name: getattr(settings, name) for name in expected} == expected


def test_moram_in_the_paper_preset_has_sixteen_atoms_a_task():
    config = XtailPlan.build_method(make_settings("paper", "moram")).config
    assert (config.atoms_per_task, config.top_k, config.value_scale) == (16, 16, 1.0)
    assert config.threshold == 0.2


@pytest.mark.parametrize("method", TAKEN)
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_presets_make_valid_settings_and_methods(preset, method):
    changes = [{"method_args.width": 32}] if method == "rail-primal" else []
    settings = make_settings(preset, method, changes=changes)
    assert settings.preset == preset and settings.method == method
    XtailPlan.build_method(settings)
    # As config.json holds them, and as a file of settings gives them back.
    back = XtailSettings(**json.loads(json.dumps(settings.to_dict())))
    assert back == settings


def test_the_small_preset_needs_neither_download_nor_data():
    settings = make_settings("small")
    assert (settings.backbone, settings.pretrained, settings.data_dir) == ("small", "auto", "")
    names = ("symbols", "letters", "digits", "greek", "shapes", "textures")
    assert settings.datasets == names


def test_a_file_adds_to_the_presets_arguments_as_set_does(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("method_args: {top_k: 4}\n")
    read = make_settings("paper", "moram", files=[path])
    assert read.method_args == {
        "temperature": 0.01,
        "threshold": 0.2,
        "value_scale": 1.0,
        "top_k": 4,
    }
    assert read == make_settings("paper", "moram", changes=[{"method_args.top_k": 4}])


def test_the_preset_may_stand_in_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: small\nseed: 5\n")
    settings = make_settings(None, "lora", files=[path])
    assert (settings.preset, settings.backbone, settings.seed) == ("small", "small", 5)
    assert make_settings(None, "lora", changes=[{"data_dir": "x"}]).preset == "paper"


def test_streams_have_names_and_rates_may_differ():
    settings = make_settings("paper", "moe-adapters", changes=[{"datasets": "mtil"}])
    assert settings.datasets == (*TEN[:2], "cifar100", *TEN[2:])
    assert make_settings("paper", changes=[{"datasets": "xtail"}]).datasets == TEN
    with pytest.raises(ValueError, match=r'lr has no value for dtd and no "\*"'):
        make_settings("paper", changes=[{"datasets": "dtd", "lr": {"mnist": 1e-3}}])


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("method", ["lora", "codyra", "moe-lora", "joint", "ewc", "o-lora"])
def test_methods_on_lora_have_no_scale_whatever_the_rank(method, rank):
    built = XtailPlan.build_method(make_settings("paper", method, changes=[{"rank": rank}]))
    assert built.rank == built.alpha == rank


@pytest.mark.parametrize("preset", ["papers", "trace"])
def test_an_unknown_preset_lists_those_that_are(preset):
    with pytest.raises(ValueError, match=re.escape("preset must be one of paper, small, got")):
        make_settings(preset)
