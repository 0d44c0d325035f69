"""Presets of `moram xtail`: the published protocol, written out, and that all of them are valid."""

import json
import re

import pytest
from xtail_support import TAKEN

from moram.xtail.plan import build_method
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


@pytest.mark.parametrize("method", [m for m in TAKEN if m != "moe-adapters"])
def test_the_paper_preset_is_the_published_protocol(method):
    settings = make_settings("paper", method)
    assert {name: getattr(settings, name) for name in PAPER} == PAPER
    training = settings.train_settings()
    assert training.steps(160) == training.steps(6352) == 500
    assert training.drop_last is False and training.clip is None
    assert training.betas == (0.9, 0.9999)


def test_moe_adapters_learn_by_their_own_papers_loss_in_the_paper_preset():
    settings = make_settings("paper", "moe-adapters")
    own = {"lr": 1e-3, "betas": (0.9, 0.999), "text_loss": False, "label_smoothing": 0.2}
    assert {name: getattr(settings, name) for name in PAPER} == PAPER | own


def test_moram_in_the_paper_preset_has_sixteen_atoms_a_task():
    config = build_method(make_settings("paper", "moram")).config
    assert (config.atoms_per_task, config.top_k, config.value_scale) == (16, 16, 1.0)
    assert config.threshold == 0.2


@pytest.mark.parametrize("method", TAKEN)
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_presets_make_valid_settings_and_methods(preset, method):
    changes = [{"method_args.width": 32}] if method == "rail-primal" else []
    settings = make_settings(preset, method, changes=changes)
    assert settings.preset == preset and settings.method == method
    build_method(settings)
    # As config.json holds them, and as a file of settings gives them back.
    back = XtailSettings(**json.loads(json.dumps(settings.to_dict())))
    assert back == settings


def test_the_small_preset_needs_neither_download_nor_data():
    settings = make_settings("small")
    assert (settings.backbone, settings.pretrained, settings.data_dir) == ("small", "auto", "")
    names = ("digits", "greek", "letters", "shapes", "symbols", "textures")
    assert settings.datasets == names


@pytest.mark.parametrize("preset", ["papers", "trace"])
def test_an_unknown_preset_lists_those_that_are(preset):
    with pytest.raises(ValueError, match=re.escape("preset must be one of paper, small, got")):
        make_settings(preset)
