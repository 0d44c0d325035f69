"""Wrapped, sharded and broadcast models save what the plain one would, and load it."""

import json
import re

import pytest
import shard_worker
import torch
from tiny_models import (
    CONFIG,
    Mlp,
    fill_values,
    language_model,
    open_clip_model,
    small_config,
    token_ids,
    trained_mlp,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import moram
from moram import adapters
from moram.wrappers import inner_name, plain_names, unwrapped

IDS = token_ids()
PATHS = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]


def compiled(model):
    return torch.compile(model, backend="eager")


def with_layer(wrap):
    """Wrap the first block of a Llama."""

    def wrapped(model):
        model.model.layers[0] = wrap(model.model.layers[0])
        return model

    return wrapped


def with_projection(wrap):
    """Wrap one projection, which then is an adapter or a Linear."""

    def wrapped(model):
        attention = model.model.layers[1].self_attn
        attention.q_proj = wrap(attention.q_proj)
        return model

    return wrapped


def peft_stand_in():
    """Classes that hold a model as PEFT's do."""

    class BaseTuner(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *args, **more):
            return self.model(*args, **more)

    class PeftModel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = LoraModel(model)

        def forward(self, *args, **more):
            return self.base_model(*args, **more)

    class LoraModel(BaseTuner):
        pass

    for kind in (BaseTuner, PeftModel, LoraModel):
        kind.__module__ = "peft.stand_in"
    return PeftModel


WRAPS = {
    "compile": compiled,
    "compiled block": with_layer(compiled),
    "compiled projection": with_projection(compiled),
    "checkpointed block": with_layer(checkpoint_wrapper),
    "checkpointed projection": with_projection(checkpoint_wrapper),
    "DataParallel": nn.DataParallel,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
    "peft": lambda model: peft_stand_in()(model),
    "two at once": lambda model: nn.DataParallel(compiled(with_layer(checkpoint_wrapper)(model))),
}


@torch.no_grad()
def answers(model):
    return model(input_ids=IDS, use_cache=False).logits


def learner():
    model = language_model()
    moram.inject(model, small_config(), generator=torch.Generator().manual_seed(1))
    fill_values(model)
    moram.grow(model)
    fill_values(model, 1)
    return model


def layers_in(folder):
    return list(json.loads((folder / CONFIG).read_text())["layers"])


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_model_saves_plain_names(tmp_path, name):
    model = learner()
    expected = answers(model)
    moram.save(WRAPS[name](model), tmp_path)
    assert layers_in(tmp_path) == PATHS
    fresh = language_model()
    moram.load(fresh, tmp_path)
    assert torch.equal(answers(fresh), expected)


@pytest.mark.parametrize("into", ["plain", "injected"])
@pytest.mark.parametrize("name", WRAPS)
def test_a_checkpoint_loads_into_a_wrapped_model(tmp_path, name, into):
    model = learner()
    moram.save(model, tmp_path)
    fresh = language_model()
    if into == "injected":
        moram.inject(fresh, small_config())
    fresh = WRAPS[name](fresh)
    moram.load(fresh, tmp_path)
    assert len(adapters(fresh)) == len(PATHS)
    torch.testing.assert_close(answers(fresh), answers(model))


@pytest.mark.parametrize("name", WRAPS)
def test_injection_into_a_wrapped_model_matches_plain_names(name):
    model = WRAPS[name](language_model())
    config = small_config(targets=("model.layers.*.q_proj", "v_proj"), exclude=("model.layers.0",))
    report = moram.inject(model, config)
    assert len(report.paths) == 2
    assert report.excluded == {"model.layers.0": 2}
    before = answers(model)
    fill_values(model)
    assert not torch.allclose(answers(model), before, atol=1e-4)


def test_auto_knows_a_wrapped_model():
    model = nn.DataParallel(open_clip_model())
    assert len(moram.inject(model, small_config()).paths) == 2 * 2 * 6


def test_a_trained_head_in_a_wrapped_model_has_a_plain_name(tmp_path):
    model = trained_mlp()
    model.head = nn.Linear(8, 2)
    moram.save(compiled(model), tmp_path)
    assert list(json.loads((tmp_path / CONFIG).read_text())["trained"]) == [
        "head.weight",
        "head.bias",
    ]
    fresh = Mlp()
    fresh.head = nn.Linear(8, 2)
    moram.load(compiled(fresh), tmp_path)
    assert torch.equal(fresh.head.weight, model.head.weight)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Mlp()

    model = Holder()
    assert inner_name(model) is None and unwrapped(model) is model
    moram.inject(model, small_config(targets=("up",)))
    moram.save(model, tmp_path)
    assert layers_in(tmp_path) == ["module.up"]
    assert plain_names(nn.DataParallel(model))["module.module.up"] == "module.up"


def results_of(name, folder):
    torch.multiprocessing.spawn(shard_worker.run, args=(name, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_fully_sharded_adapters_grow_save_and_load_or_say_what_to_do(tmp_path):
    results = results_of("shard", tmp_path)
    expected = shard_worker.learner()
    shard_worker.next_task(expected)
    plain = Mlp()
    moram.load(plain, tmp_path / "sharded")
    message = (
        "cannot replace 4 atoms by 3: fully_shard holds these parameters; grow by as many atoms, "
        "or keep the adapters out of it: "
        "fully_shard(model, ignored_params=set(moram.parameters(model)))"
    )
    for result in results:
        torch.testing.assert_close(result["output"], expected(shard_worker.X).detach())
        torch.testing.assert_close(result["loaded"], result["output"])
        torch.testing.assert_close(plain(shard_worker.X).detach(), result["output"])
        assert result["grown"] == message
    kept = Mlp()
    moram.load(kept, tmp_path / "kept")
    assert {a.bank.num_frozen for a in adapters(kept).values()} == {4 + 4 + 3}
    torch.testing.assert_close(kept(shard_worker.X).detach(), results[0]["kept"])


def test_fsdp_saves_whole_atoms_and_refuses_what_it_would_undo(tmp_path):
    results = results_of("flat", tmp_path)
    expected = shard_worker.learner()
    shard_worker.next_task(expected)
    plain = Mlp()
    moram.load(plain, tmp_path / "whole")
    torch.testing.assert_close(plain(shard_worker.X), expected(shard_worker.X))
    # Parameters lie side by side: 4 x 8 keys, 4 x 12 values, 4 x 12 keys, 4 x 8 values, cut in two.
    for result in results:
        for act in ("grow", "save"):
            assert re.fullmatch(
                r"current_keys must be whole, \[N, (8|12)\], got a shard \(\d+,\); do this inside "
                r"FullyShardedDataParallel\.summon_full_params\(model\)",
                result[act],
            )
        assert result["replace"].startswith("cannot replace 4 atoms by 3: fully_shard holds")


def test_what_one_process_loaded_all_answer_with(tmp_path):
    model = shard_worker.learner(tasks=3, seed=4)
    moram.save(model, tmp_path)
    for result in results_of("broadcast", tmp_path):
        assert result["frozen"] == [8, 8]
        torch.testing.assert_close(result["output"], model(shard_worker.X).detach())
