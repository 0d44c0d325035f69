"""MoRAM as a PEFT method: what PEFT's users do with any other."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftType
from peft_support import banks, config, learn, logits, peft_model, plain, save_base, settled
from tiny_models import (
    assert_equal,
    fill_values,
    images,
    language_model,
    open_clip_model,
    token_ids,
)

import moram
from moram import adapters
from moram.peft import MoRAMTunerLinear


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def paths(model):
    """The adapted layers' names without those of wrappers, block and all."""
    return [path.removeprefix("base_model.model.model.") for path in adapters(model)]


def test_the_method_is_one_of_pefts_types():
    kind = PeftType["MORAM"]
    assert PeftType("MORAM") is kind and kind == "MORAM" and kind.value == "MORAM"
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind
    assert kind in list(PeftType)


def test_tasks_learned_through_peft_are_those_learned_without(base):
    through, without = peft_model(base), plain(base)
    settings = config().settings_of(None).to_dict()
    moram.inject(without, moram.MoRAMConfig(**(settings | {"targets": ("q_proj", "v_proj")})))
    for one, other in zip(adapters(through).values(), adapters(without).values(), strict=True):
        other.load_adapter_state(one.adapter_state())
    for task in range(2):
        learn(through, task)
        learn(without, task)
    assert_equal(banks(through), banks(without))
    assert torch.equal(logits(through), logits(without))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": r".*layers\.1\..*(k|v)_proj"}, 2),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "llama"}, 8),
        ({"target_modules": "llama+mlp"}, 14),
        ({"target_modules": None}, 8),
        ({"target_modules": "auto"}, 8),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, 3),
        ({"target_modules": "llama", "exclude_modules": r".*layers\.0\..*"}, 4),
        ({"layers_to_transform": [1]}, 2),
        ({"target_modules": "llama", "layers_to_transform": 1}, 4),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, 7),
        ({"target_modules": r".*\.(q|v)_proj", "layers_to_transform": 0}, 2),
    ],
)
def test_target_modules_are_those_of_every_other_method(base, changes, expected):
    model = peft_model(base, **changes)
    assert len(adapters(model)) == expected
    assert sum(model.base_model.matches.values()) == expected


def test_each_name_says_how_many_layers_it_took(base):
    assert peft_model(base).base_model.matches == {"q_proj": 2, "v_proj": 2}


def test_atoms_pattern_gives_layers_atoms_of_their_own_for_every_task(base, tmp_path):
    model = peft_model(base, atoms_pattern={"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 3})
    for task in range(2):
        learn(model, task)
    sizes = {
        path: adapter.bank.num_atoms
        for path, adapter in zip(paths(model), adapters(model).values(), strict=True)
    }
    assert sizes == {
        "layers.0.self_attn.q_proj": 6,
        "layers.0.self_attn.v_proj": 4,
        "layers.1.self_attn.q_proj": 8,
        "layers.1.self_attn.v_proj": 4,
    }
    moram.save(model, tmp_path / "moram")
    model.save_pretrained(tmp_path / "peft")
    ways = [plain(base), plain(base), plain(base)]
    moram.load(ways[0], tmp_path / "moram")
    moram.load(ways[1], tmp_path / "peft")
    ways[2] = PeftModel.from_pretrained(ways[2], tmp_path / "moram", is_trainable=True)
    learn(model, 2)
    for other in ways:
        learn(other, 2)
        assert_equal(banks(other), banks(model))


def test_only_the_atoms_of_the_current_task_are_trainable(base):
    model = peft_model(base)
    learn(model, 0)
    learn(model, 1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.model.{path}.moram_bank.default.current_{part}"
        for path in paths(model)
        for part in ("keys", "values")
    }
    assert model.get_model_status().requires_grad == {"default": True}


def test_disabled_unloaded_and_plain_models_answer_alike(base):
    model, untouched = peft_model(base), logits(plain(base))
    fill_values(model)
    assert not torch.equal(logits(model), untouched)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    assert not torch.equal(logits(model), untouched)
    left = model.unload()
    assert torch.equal(logits(left), untouched) and not adapters(left)


def test_adapters_of_one_model_are_banks_of_their_own(base, tmp_path):
    model = peft_model(base, "one")
    learn(model, 0)
    model.add_adapter("other", config(target_modules=["v_proj", "o_proj"]))
    assert_equal(logits(model), logits(model))
    one = logits(model)
    model.set_adapter("other")
    assert [path.rpartition(".")[2] for path in paths(model)] == ["v_proj", "o_proj"] * 2
    assert torch.equal(logits(model), logits(plain(base)))
    model.train()
    learn(model, 1)
    learn(model, 2)
    other = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), one) and not torch.equal(one, other)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(base), tmp_path / "one", adapter_name="one")
    assert torch.equal(logits(loaded), one)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), other)
    status = loaded.get_model_status()
    assert status.available_adapters == ["one", "other"] and status.active_adapters == ["other"]
    loaded.delete_adapter("other")
    assert torch.equal(logits(loaded), one) and "other" not in loaded.peft_config


def test_an_adapter_injected_without_a_peft_model_learns_and_is_saved(base, tmp_path):
    model = inject_adapter_in_model(config(), plain(base))
    assert all(isinstance(layer, MoRAMTunerLinear) for layer in adapters(model).values())
    learn(model, 0)
    moram.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(plain(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_adds_saves_and_deletes_an_adapter(base, tmp_path):
    model = plain(base)
    model.add_adapter(config(), "mine")
    learn(model, 0)
    learn(model, 1)
    model.save_pretrained(tmp_path)
    other = plain(base)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), logits(model))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(plain(base)))
    model.enable_adapters()
    model.delete_adapter("mine")
    assert torch.equal(logits(model), logits(plain(base)))


@pytest.mark.parametrize("kind", ["clip", "moram"])
def test_open_clip_is_split_adapted_and_loaded(kind, tmp_path):
    model = get_peft_model(
        open_clip_model(), config(target_modules="open_clip", task_type=None, protect=None)
    )
    assert {path.rpartition(".")[2] for path in adapters(model)} >= {"q_proj", "out_proj", "c_fc"}
    fill_values(model)
    model.save_pretrained(tmp_path) if kind == "clip" else moram.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(open_clip_model(), tmp_path).eval()
    for encode, x in (("encode_image", images()), ("encode_text", token_ids(2, 8))):
        with torch.no_grad():
            expected, found = (getattr(m.eval(), encode)(x) for m in (model, loaded))
        assert torch.equal(found, expected)
    other = open_clip_model()
    moram.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other.encode_image(images()), model.encode_image(images()))


def test_one_tower_of_an_open_clip_is_enough():
    model = get_peft_model(
        open_clip_model(), config(target_modules="open_clip-vision", task_type=None)
    )
    assert all(".visual." in path for path in adapters(model))


def test_generation_with_and_without_a_static_cache_is_alike(base):
    model = peft_model(base)
    learn(model, 0)
    model.eval()
    ids = token_ids(1, 4)
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    found = model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, cache_implementation="static"
    )
    assert torch.equal(found, expected)


def test_a_quantised_or_16_bit_base_keeps_float32_atoms():
    low = language_model().to(torch.bfloat16)
    model = get_peft_model(low, config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in moram.parameters(model)} == {torch.float32}
    half = get_peft_model(language_model().to(torch.bfloat16), config(atom_dtype="bfloat16"))
    assert {p.dtype for p in moram.parameters(half)} == {torch.bfloat16}


def test_new_heads_are_trained_and_travel_both_ways(base, tmp_path):
    from transformers import AutoModelForSequenceClassification

    def fresh():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        return settled(model.eval())

    model = get_peft_model(fresh(), config(task_type="SEQ_CLS", protect=None))
    fill_values(model)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save.default.weight.normal_()
    ids = token_ids()
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "peft")
    moram.save(model, tmp_path / "moram")
    for folder in ("peft", "moram"):
        loaded = PeftModel.from_pretrained(fresh(), tmp_path / folder).eval()
        assert torch.equal(loaded(ids).logits, expected), folder
        other = fresh()
        about = moram.load(other, tmp_path / folder)
        assert torch.equal(other(ids).logits, expected), folder
        assert list(about["trained"]) == ["score.weight"]


def test_a_compiled_model_keeps_one_graph_over_tasks(base):
    model, graphs = peft_model(base, protect=None, task_type=None), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    inner = model.get_base_model()
    compiled = torch.compile(inner, backend=count, fullgraph=True)
    ids = token_ids()
    for task in range(3):
        learn(model, task)
        model.eval()
        with torch.no_grad():
            assert torch.equal(compiled(ids).logits, inner(ids).logits)
    assert len(graphs) == 1
