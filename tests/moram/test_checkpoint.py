"""Checkpoints: round trips, the layout on disk, crashes. Refusals have their own file."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    CONFIG,
    WEIGHTS,
    Mlp,
    assert_untouched,
    describe,
    fill_values,
    language_model,
    open_clip_model,
    small_config,
    token_ids,
    trained_mlp,
)
from torch import nn

import moram
from moram import MoRAMLinear, adapters

PARTS = ("frozen_keys", "frozen_values", "current_keys", "current_values")
LLAMA_PATHS = [
    f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "k", "v", "o")
]


def inputs():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("into", ["plain", "injected", "grown"])
def test_llama_round_trip_gives_equal_outputs(tmp_path, into):
    model = language_model()
    moram.inject(model, small_config(threshold=0.1))
    fill_values(model)
    moram.grow(model)
    fill_values(model, 1)
    ids = token_ids()
    expected = model(ids).logits
    moram.save(model, tmp_path)

    fresh = language_model()
    assert not torch.equal(fresh(ids).logits, expected)
    if into != "plain":
        moram.inject(fresh, small_config(atoms_per_task=3, top_k=1, value_scale=7.0, threshold=0.9))
        fill_values(fresh, 5)
    if into == "grown":
        for _ in range(3):
            moram.grow(fresh)
    moram.load(fresh, tmp_path)

    assert torch.equal(fresh(ids).logits, expected)
    assert {a.config for a in adapters(fresh).values()} == {small_config(threshold=0.1)}
    assert {(a.bank.num_frozen, a.bank.num_current) for a in adapters(fresh).values()} == {(4, 4)}
    trainable = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert len(trainable) == 16
    assert all(n.endswith(("current_keys", "current_values")) for n in trainable)


def test_a_loaded_model_goes_on_learning_like_the_saved_one(tmp_path):
    model = trained_mlp()
    moram.save(model, tmp_path)
    loaded = Mlp()
    moram.load(loaded, tmp_path)
    for each in (model, loaded):
        moram.grow(each, generator=torch.Generator().manual_seed(8))
        fill_values(each, 6)
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_open_clip_round_trip_splits_by_itself(tmp_path):
    model = open_clip_model()
    moram.inject(model, small_config())
    fill_values(model)
    expected = model.encode_text(token_ids(2, 8))
    moram.save(model, tmp_path)
    fresh = open_clip_model()
    about = moram.load(fresh, tmp_path)
    assert len(about["layers"]) == 24
    assert torch.equal(fresh.encode_text(token_ids(2, 8)), expected)


def test_loading_into_a_bfloat16_copy_of_the_base(tmp_path):
    model = language_model()
    moram.inject(model, small_config())
    fill_values(model)
    moram.save(model, tmp_path)
    low = language_model().to(torch.bfloat16)
    plain = low(token_ids()).logits
    moram.load(low, tmp_path)
    for path, adapter in adapters(low).items():
        assert adapter.bank.current_keys.dtype == torch.float32
        assert torch.equal(adapter.bank.current_values, adapters(model)[path].bank.current_values)
    output = low(token_ids()).logits
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, plain)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saving_changes_nothing(tmp_path, training):
    model = trained_mlp().train(training)
    before = describe(model)
    parameters = [id(p) for p in model.parameters()]
    moram.save(model, tmp_path)
    assert_untouched(model, before)
    assert [id(p) for p in model.parameters()] == parameters


def test_files_and_tensor_names_are_in_the_peft_layout(tmp_path):
    model = language_model()
    moram.inject(model, small_config())
    moram.save(model, tmp_path / "deep" / "folder")
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == [CONFIG, WEIGHTS]
    tensors = load_file(tmp_path / "deep" / "folder" / WEIGHTS)
    assert set(tensors) == {
        f"base_model.model.{path}.moram_bank.{part}"
        for path in LLAMA_PATHS
        for part in (*PARTS, "live", "is_learned")
    }
    prefix = "base_model.model.model.layers.1.self_attn.k_proj.moram_bank."
    assert tensors[prefix + "current_keys"].shape == (4, 32)
    assert tensors[prefix + "current_values"].shape == (4, 16)
    assert tensors[prefix + "frozen_keys"].shape == (0, 32)


def test_config_file_holds_sizes_tasks_settings_and_base_model(tmp_path):
    model = language_model()
    model.config._name_or_path = "someone/tiny-llama"
    config = small_config(targets=("k_proj",), exclude=("*layers.0*",), threshold=0.25)
    moram.inject(model, config)
    moram.grow(model, 3)
    moram.save(model, tmp_path, tasks=("topic", "feeling"))
    about = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert about["peft_type"] == "MORAM"
    assert about["base_model_name_or_path"] == "someone/tiny-llama"
    assert about["tasks"] == ["topic", "feeling"]
    sizes = {"in_features": 32, "out_features": 16, "frozen": 4, "current": 3}
    assert about["layers"] == {"model.layers.1.self_attn.k_proj": sizes}
    assert about["settings"] == {
        "atoms_per_task": 4,
        "top_k": 2,
        "temperature": 0.3,
        "threshold": 0.25,
        "value_scale": 2.0,
        "dropout": 0.0,
        "eps": 1e-12,
        "targets": ["k_proj"],
        "exclude": ["*layers.0*"],
        "backend": "auto",
        "precision": "ieee",
        "atom_dtype": "float32",
        "capacity": None,
        "protect": None,
        "protect_size": 256,
        "protect_examples": 80,
        "protect_strength": 0.5,
        "alignment": 0.0,
    }
    loaded = moram.load(language_model(), tmp_path)
    assert loaded == about


def test_base_model_argument_wins_over_the_models_config(tmp_path):
    moram.save(trained_mlp(), tmp_path, base_model="my base")
    message = re.escape("model has no layer up, which the checkpoint adapts (made for my base)")
    with pytest.raises(ValueError, match=message):
        moram.load(nn.Sequential(nn.Linear(8, 12)), tmp_path)


def test_saving_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no MoRAM adapters to save; call moram\.inject first"):
        moram.save(Mlp(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_saving_adapters_of_different_settings_is_refused(tmp_path):
    model = Mlp()
    model.up = MoRAMLinear.from_linear(model.up, small_config())
    model.down = MoRAMLinear.from_linear(model.down, replace(small_config(), top_k=3))
    with pytest.raises(ValueError, match="adapters must share one config to be saved together"):
        moram.save(model, tmp_path)
    assert os.listdir(tmp_path) == []


def fail_at(monkeypatch, step):
    """Make one step of `save` raise; a failing save_file leaves half a file behind."""

    def broken_save_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    def fail_on_call(number, real):
        calls = []

        def wrapped(*args):
            calls.append(args)
            if len(calls) == number:
                raise OSError("disk full")
            return real(*args)

        return wrapped

    name, number = step
    if name == "save_file":
        monkeypatch.setattr("moram.checkpoint.save_file", broken_save_file)
    elif name == "write_text":

        def broken_write(path, *args, **kwargs):
            path.write_bytes(b"{")
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", broken_write)
    else:
        monkeypatch.setattr(os, name, fail_on_call(number, getattr(os, name)))


STEPS = [
    ("save_file", 1),
    ("write_text", 1),
    ("fsync", 1),
    ("fsync", 2),
    ("replace", 1),
    ("replace", 2),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]}{step[1]}")
def test_crash_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    first, second = trained_mlp(seed=1), trained_mlp(seed=2)
    moram.save(first, tmp_path, tasks=["one"])
    with monkeypatch.context() as patched:
        fail_at(patched, step)
        with pytest.raises(OSError, match="disk full"):
            moram.save(second, tmp_path, tasks=["one", "two"])
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    # Once the weights are in place (the first replace) the new checkpoint is complete.
    survivor, tasks = (second, ["one", "two"]) if step == ("replace", 2) else (first, ["one"])
    loaded = Mlp()
    assert moram.load(loaded, tmp_path)["tasks"] == tasks
    assert torch.equal(loaded(inputs()), survivor(inputs()))
