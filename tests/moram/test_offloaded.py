"""Models whose weights accelerate keeps elsewhere: adapters live where the layer computes."""

import re

import accelerate
import pytest
import torch
from tiny_models import fill_values, language_model, small_config, token_ids

import moram
from moram import adapters
from moram.inject import inject_with
from moram.layers import LoRALinear, MoELoRALinear

IDS = token_ids()
BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")


def offloaded(model, way, folder):
    """The model with its weights off the device that computes, which is the CPU here, too."""
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, "cpu")
    where = dict.fromkeys((*BLOCKS, "model.rotary_emb", "lm_head"), way)
    return accelerate.dispatch_model(
        model, where | {"model.norm": "cpu"}, main_device="cpu", offload_dir=folder
    )


@torch.no_grad()
def answers(model):
    return model(IDS).logits


@pytest.fixture
def learner():
    model = language_model(tie_word_embeddings=False)
    moram.inject(model, small_config(), generator=torch.Generator().manual_seed(1))
    fill_values(model)
    moram.grow(model)
    fill_values(model, 1)
    return model


WAYS = ["cpu_offload", "cpu", "disk"]


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_loads_into_an_offloaded_base_and_is_saved_from_it(tmp_path, learner, way):
    moram.save(learner, tmp_path / "first")
    model = offloaded(language_model(tie_word_embeddings=False), way, tmp_path / "weights")
    moram.load(model, tmp_path / "first")
    atoms = [t for a in adapters(model).values() for t in (*a.bank.parameters(), *a.bank.buffers())]
    assert {t.device.type for t in atoms} == {"cpu"}
    assert torch.equal(answers(model), answers(learner))
    moram.save(model, tmp_path / "second")
    fresh = language_model(tie_word_embeddings=False)
    moram.load(fresh, tmp_path / "second")
    assert torch.equal(answers(fresh), answers(learner))


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_base_learns_like_a_present_one(tmp_path, way):
    trained = []
    for away in (False, True):
        model = language_model(tie_word_embeddings=False)
        if away:
            offloaded(model, way, tmp_path)
        moram.inject(model, small_config(), generator=torch.Generator().manual_seed(1))
        fill_values(model)
        for _ in range(2):
            optimizer = torch.optim.SGD(moram.grow(model, generator=torch.Generator()), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(IDS, labels=IDS).loss.backward()
                optimizer.step()
        trained.append([p.detach().clone() for p in moram.parameters(model)])
    for present, away in zip(*trained, strict=True):
        torch.testing.assert_close(away, present, rtol=0, atol=0)


def test_an_offloaded_wrong_base_is_refused(tmp_path, learner):
    moram.save(learner, tmp_path)
    model = accelerate.cpu_offload(language_model(seed=3, tie_word_embeddings=False), "cpu")
    with pytest.raises(ValueError, match="holds other weights than the model"):
        moram.load(model, tmp_path)


@pytest.mark.parametrize("kind", [LoRALinear, MoELoRALinear])
def test_other_adapters_live_where_the_layer_computes(kind):
    model = accelerate.cpu_offload(language_model(tie_word_embeddings=False), "cpu")
    inject_with(model, ("q_proj",), (), lambda linear: kind(linear, 2))
    found = adapters(model, kind).values()
    assert {p.device.type for a in found for p in a.parameters() if p.requires_grad} == {"cpu"}
    assert torch.isfinite(answers(model)).all()


def test_a_trained_head_does_not_load_into_an_offloaded_one(tmp_path):
    model = language_model(tie_word_embeddings=False)
    moram.inject(model, small_config())
    model.model.norm.requires_grad_(True)
    moram.save(model, tmp_path)
    away = accelerate.cpu_offload(language_model(tie_word_embeddings=False), "cpu")
    message = (
        "model.norm.weight must have a value to be overwritten, got an offloaded one; load first, "
        "then offload"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.load(away, tmp_path)


@pytest.mark.parametrize("act", ["forward", "grow", "save"])
def test_atoms_that_were_offloaded_with_the_model_say_what_to_do(tmp_path, learner, act):
    accelerate.cpu_offload(learner, "cpu")
    message = (
        "the atoms must stay where their layer computes, got offloaded ones; offload the base "
        "model first, then inject or load"
    )
    acts = {
        "forward": lambda: answers(learner),
        "grow": lambda: moram.grow(learner),
        "save": lambda: moram.save(learner, tmp_path),
    }
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        acts[act]()


def test_a_trainable_parameter_that_is_offloaded_is_not_saved_in_silence(tmp_path):
    model = accelerate.cpu_offload(language_model(tie_word_embeddings=False), "cpu")
    moram.inject(model, small_config())
    model.model.norm.requires_grad_(True)
    message = (
        "model.norm.weight must have a value to be saved, got a trainable parameter that is "
        "offloaded and so cannot have learned; freeze it"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        moram.save(model, tmp_path)


@pytest.mark.parametrize("act", ["inject", "load"])
def test_a_block_that_is_offloaded_as_a_whole_is_refused_and_untouched(tmp_path, learner, act):
    moram.save(learner, tmp_path)
    model = language_model(tie_word_embeddings=False)
    model = accelerate.cpu_offload(model, "cpu", preload_module_classes=["LlamaAttention"])
    names = [name for name, _ in model.named_modules()]
    path = "model.layers.0.self_attn"
    reason = (
        f"accelerate offloads {path} as a whole, and would look for the atoms among its stored "
        "weights; offload without preload_module_classes"
    )
    message = f"target 'q_proj' matches {path}.q_proj: {reason}"
    if act == "load":
        message = f"layer {path}.q_proj cannot be adapted: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        if act == "inject":
            moram.inject(model, small_config())
        else:
            moram.load(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
