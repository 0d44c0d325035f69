"""One checkpoint: what `moram.save` and PEFT write, either loads, and learning goes on from it."""

import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_support import (
    LOADERS,
    banks,
    by_moram,
    by_peft,
    by_transformers,
    config,
    learn,
    logits,
    peft_model,
    plain,
    save_base,
    settled,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from task_support import batches_of
from tiny_models import CONFIG, WEIGHTS, assert_equal, language_model

import moram
from moram import adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def taught(base):
    """A PEFT model after two tasks."""
    model = peft_model(base)
    for task in range(2):
        learn(model, task)
    return model


@pytest.fixture(scope="module", params=["peft", "moram"])
def folder(request, taught, tmp_path_factory):
    """The same adapter, written by either."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "peft":
        taught.save_pretrained(path)
    else:
        moram.save(taught, path, tasks=["first", "second"])
    return path


@pytest.mark.parametrize("load", LOADERS)
def test_what_either_writes_every_way_loads_bit_for_bit(base, taught, folder, load):
    model = load(base, folder)
    assert torch.equal(logits(model), logits(taught))
    assert_equal(banks(model), banks(taught))


@pytest.mark.parametrize("load", [by_peft, by_transformers, by_moram])
def test_a_loaded_adapter_learns_the_next_task_as_the_saved_one_would(base, folder, load):
    ways = by_moram(base, folder), load(base, folder)
    for model in ways:
        learn(model.train(), 2)
    assert_equal(banks(ways[1]), banks(ways[0]))
    assert {a.bank.num_frozen for a in adapters(ways[1]).values()} == {8}
    assert torch.equal(logits(ways[1]), logits(ways[0]))


@pytest.mark.parametrize("load", [by_peft, by_transformers, by_moram])
@pytest.mark.parametrize("writer", ["peft", "moram"])
def test_a_checkpoint_inside_a_protected_task_keeps_its_guards(base, tmp_path, writer, load):
    model = peft_model(base, target_modules="llama")
    learn(model, 0)
    with pytest.raises(KeyboardInterrupt), moram.task(model, batches_of(1)) as atoms:
        with torch.no_grad():
            for atom in atoms:
                atom.add_(0.1)
        raise KeyboardInterrupt
    model.save_pretrained(tmp_path) if writer == "peft" else moram.save(model, tmp_path)
    loaded = load(base, tmp_path)
    assert all("gain" in bank and not bank["learned"] for bank in banks(loaded))
    assert_equal(banks(loaded), banks(model))
    assert torch.equal(logits(loaded), logits(model))
    with moram.task(loaded.train(), batches_of(1)):
        pass
    assert {a.bank.num_frozen for a in adapters(loaded).values()} == {4}


@pytest.mark.parametrize("load", LOADERS)
def test_another_dtype_of_the_base_leaves_the_atoms_as_they_are(base, taught, folder, load):
    low = load(base, folder, torch.bfloat16)
    assert_equal(banks(low), banks(taught))
    assert {p.dtype for p in moram.parameters(low)} == {torch.float32}
    assert logits(low).dtype == torch.bfloat16


def test_a_base_with_a_device_map_takes_an_adapter(base, taught, folder):
    from transformers import AutoModelForCausalLM

    model = settled(AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}))
    model = PeftModel.from_pretrained(model, folder)
    assert torch.equal(logits(model), logits(taught))


def save_in_first_format(taught, tmp_path):
    """What `moram.save` wrote before PEFT could read it."""
    moram.save(taught, tmp_path)
    path = tmp_path / WEIGHTS
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["moram"])
    tensors, old = load_file(path), {}
    names = {"sketch_rows": "sketch", "guard_basis": "guard"}
    for name, tensor in tensors.items():
        start, _, part = name.partition("moram_bank.")
        layer = start.removeprefix("base_model.model.").rstrip(".")
        if part == "sketch_total":
            about["protection"][layer]["total"] = float(tensor)
        elif part not in ("live", "is_learned"):
            old[f"{start}moram_{names.get(part, part)}"] = tensor
    about |= {"format": 1, "learned": list(about["layers"])}
    save_file(old, path, metadata={"moram": json.dumps(about)})
    (tmp_path / CONFIG).write_text(json.dumps(about), encoding="utf-8")


def test_a_file_of_the_first_format_still_loads_and_its_copy_by_peft(base, taught, tmp_path):
    save_in_first_format(taught, tmp_path / "first")
    model = by_moram(base, tmp_path / "first")
    assert_equal(banks(model), banks(taught))
    moram.save(model, tmp_path / "second")
    assert torch.equal(logits(by_peft(base, tmp_path / "second")), logits(taught))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
def test_peft_says_how_a_file_of_the_first_format_is_read(base, taught, tmp_path, load):
    save_in_first_format(taught, tmp_path)
    message = (
        "format must be 2, got 1, whose tensors PEFT cannot place; moram.load(model, directory) "
        "reads 1, and moram.save then writes 2"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(base, tmp_path)


def test_the_config_says_what_moram_save_says(taught, tmp_path):
    taught.save_pretrained(tmp_path / "peft")
    moram.save(taught, tmp_path / "moram")
    one, other = (
        json.loads((tmp_path / kind / CONFIG).read_text(encoding="utf-8"))
        for kind in ("peft", "moram")
    )
    for name in ("peft_type", "format", "layers", "fingerprint", "task_type"):
        assert one[name] == other[name], name
    settings = ("targets", "exclude")
    assert {k: v for k, v in one["settings"].items() if k not in settings} == {
        k: v for k, v in other["settings"].items() if k not in settings
    }


def test_another_base_is_refused_and_left_alone(base, taught, folder):
    other = language_model(seed=5)
    names = [name for name, _ in other.named_modules()]
    message = (
        "layer model.layers.0.self_attn.q_proj holds other weights than the model this checkpoint "
        "was trained on"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(other, folder)
    assert [name for name, _ in other.named_modules()] == names


def test_a_base_of_another_size_is_refused_with_layer_and_size(folder):
    message = (
        "layer model.layers.0.self_attn.q_proj must have in_features 32 for this checkpoint, got 64"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(language_model(hidden_size=64), folder)


def test_a_config_may_be_used_again_for_a_fresh_adapter(base, taught):
    fresh = get_peft_model(plain(base), taught.peft_config["default"])
    assert {a.bank.num_atoms for a in adapters(fresh).values()} == {4}
    assert {a.bank.num_atoms for a in adapters(taught).values()} == {8}
    assert config().to_dict()["layers"] == {}


def test_a_deep_copy_saves_its_own_sizes(base, tmp_path):
    from copy import deepcopy

    model = peft_model(base)
    copy = deepcopy(model)
    learn(copy, 0)
    learn(copy, 1)
    copy.save_pretrained(tmp_path)
    assert_equal(banks(by_peft(base, tmp_path)), banks(copy))
    assert {sizes["frozen"] for sizes in model.peft_config["default"].layers.values()} == {0}


def test_shards_of_an_adapter_load(base, taught, folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    assert_equal(banks(by_moram(base, tmp_path)), banks(taught))


def test_the_card_says_base_tasks_atoms_scores_and_the_import(base, taught, tmp_path):
    adapter = taught.peft_config["default"]
    adapter.tasks, adapter.matrix = ["topic", "feeling"], [[90.0, 12.0], [88.25, 70.0]]
    taught.save_pretrained(tmp_path)
    adapter.tasks, adapter.matrix = [], None
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "library_name: peft" in card
    assert "More Information Needed" not in card
    for line in (
        "import moram.peft  # pip install 'moram[peft]'; without it, PEFT says KeyError: 'MORAM'",
        f"| base model | {base} |",
        "| tasks, in order | topic, feeling |",
        "| atoms | 8 in each of 4 layers, 4 a task |",
        "| alignment (another addition) | off |",
        "| after | topic | feeling |",
        "| feeling | 88.2 | 70.0 |",
    ):
        assert line in card.splitlines(), line


def test_a_card_keeps_what_someone_wrote(taught, tmp_path):
    taught.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nOur own words.\n", encoding="utf-8")
    taught.peft_config["default"].tasks.append("topic")
    taught.save_pretrained(tmp_path)
    taught.peft_config["default"].tasks.clear()
    card = path.read_text(encoding="utf-8")
    assert "Our own words." in card and "| tasks, in order | topic |" in card
    assert card.count("# A MoRAM adapter") == 1


def test_loading_without_the_import_names_the_method(taught, tmp_path):
    import subprocess
    import sys

    taught.save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "KeyError: 'MORAM'"
    code = f"import moram.peft; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
