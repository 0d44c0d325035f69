"""Checkpoints that cannot be loaded: a clear error, and the model is left as it was."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIG,
    WEIGHTS,
    Mlp,
    assert_untouched,
    describe,
    open_clip_model,
    small_config,
    trained_mlp,
)
from torch import nn

import moram
from moram.layers import LoRALinear


def rewrite(directory, change):
    """Write a checkpoint again with its tensors and its description changed in place."""
    path = directory / WEIGHTS
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["moram"])
    change(tensors, about)
    save_file(tensors, path, metadata={"format": "pt", "moram": json.dumps(about)})


def test_missing_directory_is_named(tmp_path):
    path = tmp_path / "nowhere" / WEIGHTS
    message = f"directory holds no MoRAM checkpoint: {path} does not exist"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        moram.load(Mlp(), tmp_path / "nowhere")


def truncate(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-20])


def cut_header(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:50])


def empty(directory):
    (directory / WEIGHTS).write_bytes(b"")


def make_foreign(directory):
    save_file({"weight": torch.zeros(2)}, directory / WEIGHTS)
    (directory / CONFIG).unlink()


def drop_tensor(directory):
    rewrite(directory, lambda t, _: t.pop("base_model.model.down.moram_bank.frozen_keys"))


def change_rows(directory):
    name = "base_model.model.down.moram_bank.current_keys"
    rewrite(directory, lambda t, _: t.update({name: torch.zeros(3, 12)}))


def raise_format(directory):
    rewrite(directory, lambda _, about: about.update(format=3))


def add_setting(directory):
    rewrite(directory, lambda _, about: about["settings"].update(colour="red"))


DAMAGES = {
    truncate: "is damaged or no safetensors file",
    cut_header: "is damaged or no safetensors file",
    empty: "is damaged or no safetensors file",
    make_foreign: "was not written by moram.save (its header has no 'moram' entry), and no "
    "adapter_config.json beside it says that PEFT wrote it for MoRAM",
    drop_tensor: "lacks base_model.model.down.moram_bank.frozen_keys",
    change_rows: "base_model.model.down.moram_bank.current_keys must be (4, 12), got (3, 12)",
    raise_format: "has format 3, this version reads 2",
    add_setting: "settings hold names this version does not know: colour",
}


@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file_is_refused_and_the_model_untouched(tmp_path, damage, injected):
    moram.save(trained_mlp(), tmp_path)
    damage(tmp_path)
    model = trained_mlp(1, seed=4).train() if injected else Mlp()
    before = describe(model)
    with pytest.raises(ValueError, match=re.escape(DAMAGES[damage])):
        moram.load(model, tmp_path)
    assert_untouched(model, before)


class Renamed(nn.Module):
    """Another architecture with one layer of the same name."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(8, 12), nn.Linear(12, 8)


def lora_mlp():
    model = Mlp()
    model.up = LoRALinear(model.up, 2)
    return model


WRONG_MODELS = {
    "wider": (
        lambda: Mlp(width=10),
        "layer up must have in_features 8 for this checkpoint, got 10 (made for base)",
    ),
    "deeper": (
        lambda: Mlp(hidden=16),
        "layer up must have out_features 12 for this checkpoint, got 16 (made for base)",
    ),
    "other_weights": (
        lambda: Mlp(seed=1),
        "layer up holds other weights than the model this checkpoint was trained on",
    ),
    "missing_layer": (Renamed, "model has no layer down, which the checkpoint adapts"),
    "already_lora": (lora_mlp, "it is already adapted (LoRALinear); eject the adapters first"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_wrong_base_is_refused_and_the_model_untouched(tmp_path, case):
    moram.save(trained_mlp(), tmp_path, base_model="base")
    build, message = WRONG_MODELS[case]
    model = build()
    before = describe(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        moram.load(model, tmp_path)
    assert_untouched(model, before)


def test_adapters_on_other_projections_are_refused(tmp_path):
    moram.save(trained_mlp(), tmp_path)
    model = Mlp()
    moram.inject(model, small_config(targets=("up",)))
    before = describe(model)
    message = "model and checkpoint adapt different projections, for example down"
    with pytest.raises(ValueError, match=message):
        moram.load(model, tmp_path)
    assert_untouched(model, before)


def test_open_clip_stays_packed_when_a_load_is_refused(tmp_path):
    model = open_clip_model()
    moram.inject(model, small_config())
    moram.save(model, tmp_path)
    other = open_clip_model()
    with torch.no_grad():
        other.visual.transformer.resblocks[0].attn.in_proj_weight.add_(1)
    before = describe(other)
    with pytest.raises(ValueError, match="holds other weights"):
        moram.load(other, tmp_path)
    assert_untouched(other, before)


def test_attention_that_cannot_be_split_is_refused_and_untouched(tmp_path):
    model = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
    moram.inject(model, small_config(targets=("attn.out_proj",)))
    moram.save(model, tmp_path)
    other = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    with torch.no_grad():
        other["attn"].out_proj.weight.copy_(model["attn"]["out_proj"].weight)
    before = describe(other)
    with pytest.raises(ValueError, match=r"attn\.out_proj"):
        moram.load(other, tmp_path)
    assert_untouched(other, before)
