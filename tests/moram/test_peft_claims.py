"""What PEFT's own suite claims of every method and our other tests do not, in our words."""

import copy
import re

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_support import banks, config, learn, logits, peft_model, plain, save_base, settled
from safetensors.torch import load_file
from tiny_models import WEIGHTS, assert_equal
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

import moram
from moram import adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


HEADS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, "score"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("task_type", HEADS)
def test_heads_that_peft_names_late_are_trained_saved_and_left_unadapted(base, tmp_path, task_type):
    kind, head = HEADS[task_type]

    def fresh():
        torch.manual_seed(0)
        return settled(kind.from_pretrained(base).eval())

    asked = config(task_type=task_type, target_modules="all-linear", protect=None)
    model = get_peft_model(fresh(), asked)
    assert len(adapters(model)) == 14
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(f"{head}.modules_to_save.default.weight" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 7)[None]
    expected = model.eval()(ids)[0]
    loaded = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert torch.equal(loaded(ids)[0], expected)
    # The same config again, for a second adapter and for a second model.
    model.add_adapter("second", asked)
    assert len(adapters(get_peft_model(fresh(), asked))) == 14


def test_the_name_of_an_adapter_changes_nothing_but_names(base):
    found = {}
    for name in ("default", "other-name"):
        model = peft_model(base, name)
        learn(model, 0)
        state = {key.replace(name, "*"): t for key, t in model.state_dict().items()}
        found[name] = (state, logits(model))
    assert_equal(found["default"], found["other-name"])


def test_names_that_hold_each_other_are_saved_apart(base, tmp_path):
    model = peft_model(base)
    expected = set(get_peft_model_state_dict(model))
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert set(load_file(tmp_path / WEIGHTS)) == expected
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize("trainable", [False, True])
def test_loading_trains_the_atoms_only_where_asked(base, tmp_path, trainable):
    peft_model(base).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(plain(base), tmp_path, is_trainable=trainable)
    model.load_adapter(tmp_path, "other", is_trainable=trainable)
    wanted = {name for name, _ in model.named_parameters() if "moram_bank" in name}
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == (wanted if trainable else set())


def test_gradients_can_be_turned_off_and_on_by_adapter(base):
    model = peft_model(base)
    model.add_adapter("other", config())

    def on(adapter):
        return {p.requires_grad for n, p in model.named_parameters() if f".{adapter}." in n}

    assert (on("default"), on("other")) == ({True}, {False})
    model.set_requires_grad("other")
    assert (on("default"), on("other")) == ({True}, {True})
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert (on("default"), on("other")) == ({False}, {False})


def test_leaving_a_block_without_adapters_restores_what_was_before(base):
    model = peft_model(base)
    learn(model, 0)
    enabled = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            off = logits(model)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), enabled) and not torch.equal(enabled, off)


def test_deleting_leaves_no_trace_and_the_last_one_may_go(base):
    model = peft_model(base)
    model.add_adapter("gone", config(atoms_pattern={"v_proj": 2}))
    layers = list(adapters(model).values())
    model.delete_adapter("gone")
    for layer in layers:
        for kept in (layer.moram_bank, layer.moram_config, layer.moram_settings):
            assert set(kept) == {"default"}
    model.delete_adapter("default")
    assert model.active_adapters == []
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        assert torch.equal(model.base_model(ids).logits, plain(base)(ids).logits)


def test_the_base_is_read_out_as_it_was(base):
    model = peft_model(base)
    learn(model, 0)
    assert_equal(dict(get_base_model_state_dict(model)), dict(plain(base).state_dict()))


def test_a_grown_state_dict_fits_into_a_fresh_adapter(base):
    model = peft_model(base, protect=None)
    for task in range(2):
        learn(model, task)
    state = get_peft_model_state_dict(model)
    other = peft_model(base, seed=1, protect=None)
    assert set_peft_model_state_dict(other, state).unexpected_keys == []
    assert_equal(banks(other), banks(model))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_state_dict_names_the_layers_of_a_compiled_model(base, compiled_before):
    def compiled():
        return torch.compile(plain(base), backend="eager")

    taught = inject_adapter_in_model(config(), compiled() if compiled_before else plain(base))
    learn(taught, 0)
    state = get_peft_model_state_dict(taught)
    model = compiled()
    inject_adapter_in_model(config(), model, state_dict=state)
    set_peft_model_state_dict(model if compiled_before else model._orig_mod, state)
    assert_equal(banks(model), banks(taught))
    assert torch.equal(logits(model), logits(taught))


def test_atoms_may_wait_without_memory_for_their_state(base):
    taught = inject_adapter_in_model(config(), plain(base))
    learn(taught, 0)
    model = inject_adapter_in_model(config(), plain(base), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if "moram_bank" in n)
    state = get_peft_model_state_dict(taught)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(taught))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(base, use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = peft_model(base, protect=None)
        with torch.no_grad():
            for parameter in moram.parameters(model):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        if checkpointing:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()(torch.arange(1, 7)[None]).logits.square().sum().backward()
        found.append([p.grad.clone() for p in moram.parameters(model)])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert_equal(found[1], found[0])


def test_a_saved_adapter_of_a_config_of_ones_own_keeps_the_sizes_of_its_file(base, tmp_path):
    model = peft_model(base)
    for task in range(2):
        learn(model, task)
    model.save_pretrained(tmp_path)
    own = config(atoms_per_task=2)
    loaded = PeftModel.from_pretrained(plain(base), tmp_path, config=own, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert {a.bank.num_atoms for a in adapters(loaded).values()} == {8}
    moram.grow(loaded)
    assert {a.bank.num_atoms for a in adapters(loaded).values()} == {10}


def test_a_family_without_a_preset_asks_for_names():
    message = (
        'target_modules None: targets="auto" does not know Linear (model_type None); name the '
        "projections, or a preset: llama, "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        get_peft_model(torch.nn.Linear(2, 2), config(target_modules=None, task_type=None))


def test_a_second_adapter_of_the_same_name_does_not_take_the_atoms_of_the_first(base):
    model = peft_model(base)
    learn(model, 0)
    before, taught = copy.deepcopy(banks(model)), logits(model)
    message = (
        "adapter_name must be another, got 'default': the model has an adapter of that name, whose "
        "atoms would be lost; take that one out with delete_adapter or unload() first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_peft_model(model, config())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        inject_adapter_in_model(config(), model.base_model.model)
    assert_equal(banks(model), before)
    assert torch.equal(logits(model), taught)


def test_parameters_that_are_no_module_are_refused():
    message = (
        "target_parameters must be None, got ['up.weight']: MoRAM adapts modules; name them in "
        "target_modules"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(target_parameters=["up.weight"])
