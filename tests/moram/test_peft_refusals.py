"""What PEFT cannot do with MoRAM is said in our words, before anything has changed."""

import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_support import config, logits, plain, save_base
from tiny_models import assert_untouched, describe, language_model, open_clip_model, token_ids
from torch import nn

import moram
from moram.peft import MoRAMPeftConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


CLOSEST = "matches no module of LlamaForCausalLM; closest names: "
REFUSED = {
    "typo": (
        {"target_modules": ["q_proj", "v_prog"]},
        f"target_modules 'v_prog' {CLOSEST}v_proj, q_proj, o_proj",
    ),
    "expression": (
        {"target_modules": r".*attention\.q"},
        rf"target_modules '.*attention\\.q' {CLOSEST}down_proj, gate_proj, k_proj, "
        "lm_head, o_proj, q_proj, up_proj, v_proj",
    ),
    "exclude": (
        {"exclude_modules": ["qq_proj"]},
        f"exclude_modules 'qq_proj' {CLOSEST}q_proj, v_proj, o_proj",
    ),
    "all excluded": (
        {"exclude_modules": ["self_attn.q_proj"]},
        "target_modules 'q_proj' names modules, but exclude_modules, layers_to_transform or "
        "modules_to_save leave none of them; leave the name out, too",
    ),
    "expression all excluded": (
        {"target_modules": r".*\.q_proj", "exclude_modules": r".*self_attn.*"},
        r"target_modules '.*\\.q_proj' names modules, but exclude_modules, layers_to_transform or "
        "modules_to_save leave none of them; leave the name out, too",
    ),
    "all-linear without a block": (
        {"target_modules": "all-linear", "layers_to_transform": [2]},
        "target_modules 'all-linear' names modules, but exclude_modules, layers_to_transform or "
        "modules_to_save leave none of them; leave the name out, too",
    ),
    "pattern of blocks alone": (
        {"layers_pattern": "layers"},
        "layers_pattern must come with layers_to_transform, whose blocks it finds, got 'layers' "
        "alone",
    ),
    "index": (
        {"layers_to_transform": [0, 7]},
        "layers_to_transform must be indices of blocks with a target, got 7",
    ),
    "pattern": (
        {"atoms_pattern": {"k_proj": 2}},
        "atoms_pattern 'k_proj' matches none of the 4 layers to adapt",
    ),
    "head": (
        {"target_modules": ["lm_head"]},
        "target_modules match lm_head: the output head is not adapted: fused losses read its "
        "weight and skip the module",
    ),
    "no Linear": (
        {"target_modules": ["input_layernorm"]},
        "target_modules match model.layers.0.input_layernorm: got LlamaRMSNorm, which lacks "
        "in_features, out_features or weight",
    ),
    "no name": (
        {"target_modules": []},
        "target_modules must name a projection, got none; None means those that the model's "
        "family adapts",
    ),
    "a preset of another family": (
        {"target_modules": "clip-vision"},
        "target_modules 'clip-vision': target 'self_attn.out_proj' matches no module of "
        "LlamaForCausalLM; closest names: o_proj, up_proj, v_proj",
    ),
    "module to save": (
        {"modules_to_save": ["lm_haed"]},
        "modules_to_save 'lm_haed' matches no module of LlamaForCausalLM; closest names: lm_head, "
        "layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_named_and_the_model_left_alone(case):
    changes, message = REFUSED[case]
    model = language_model()
    before = describe(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_peft_model(model, config(**changes))
    assert_untouched(model, before)


NAMES = {
    "mo": "it is part of 'moram_bank', by which PEFT knows the tensors of MoRAM",
    "a.b": "it must have letters and no dot, because it becomes part of tensors' names",
    "": "it must have letters and no dot, because it becomes part of tensors' names",
    "keys": "torch's ModuleDict, which holds the banks, has an attribute of that name",
    "self_attn": "a module of the model has that name, and PEFT would leave its tensors out",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_peft_would_mix_up_are_refused(name):
    message = f"adapter_name must be another, got {name!r}: {NAMES[name]}"
    model = language_model()
    before = describe(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_peft_model(model, config(), adapter_name=name)
    assert_untouched(model, before)


MERGE = (
    "MoRAM cannot be merged into the base: what an atom writes depends on the input, so no weight "
    "does the same; keep the adapter attached, or take it out with unload()"
)


def test_merging_and_adding_up_are_refused_with_the_reason():
    model = get_peft_model(language_model(), config())
    before = describe(model)
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=f"^{re.escape(MERGE)}$"):
            merge()
    layer = next(iter(moram.adapters(model).values()))
    with pytest.raises(NotImplementedError, match=f"^{re.escape(MERGE)}$"):
        layer.merge()
    message = (
        "MoRAM adapters cannot be added up: which atoms fire depends on all of a bank's; learn the "
        "tasks one after the other in one adapter (moram.task)"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert_untouched(model, before)


def test_two_adapters_at_once_are_refused():
    model = get_peft_model(language_model(), config())
    model.add_adapter("second", config())
    message = (
        "adapter_names must name one MoRAM adapter, got default, second: tasks that act together "
        "are learned one after the other in one adapter (moram.task)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.base_model.set_adapter(["default", "second"])
    message = (
        "adapter_names: a batch cannot mix MoRAM adapters; call the model for each adapter by "
        "itself, after set_adapter"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        model(token_ids(), adapter_names=["default", "second"])


def test_settings_are_checked_as_everywhere():
    with pytest.raises(
        ValueError, match=re.escape("threshold must be in [0, 1) (0 turns it off), got 1.5")
    ):
        config(threshold=1.5)
    with pytest.raises(TypeError, match=re.escape("atoms_pattern['q'] must be an integer >= 1")):
        config(atoms_pattern={"q": "many"})
    message = "settings hold names this version does not know: colour"
    with pytest.raises(ValueError, match=f"^{message}$"):
        MoRAMPeftConfig(settings={"colour": "red"})


def test_another_methods_layers_are_refused(base):
    model = get_peft_model(plain(base), LoraConfig(target_modules=["q_proj"]))
    before = describe(model)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", config())
    assert_untouched(model, before)
    message = (
        "target_modules match model.layers.0.self_attn.q_proj: another PEFT method adapts it "
        "already; use one method, or moram.inject beside it"
    )
    from peft import inject_adapter_in_model

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        inject_adapter_in_model(config(), model.base_model.model, "other")


def test_packed_attention_asks_for_the_preset():
    message = (
        "target_modules 'q_proj' matches no module of CLIP; closest names: c_proj; the model has "
        "nn.MultiheadAttention, whose projections are packed: use an open_clip preset or call "
        "moram.models.split_attention(model) first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_peft_model(open_clip_model(), config(target_modules=["q_proj"], task_type=None))


def test_a_failed_preset_leaves_packed_attention_packed():
    model = open_clip_model()
    before = describe(model)
    with pytest.raises(ValueError, match="atoms_pattern 'zzz' matches none"):
        get_peft_model(
            model,
            config(target_modules="open_clip", task_type=None, atoms_pattern={"zzz": 2}),
        )
    assert_untouched(model, before)


def test_a_parameter_that_peft_cannot_place_is_refused(base, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(4, 8)
            self.down = nn.Linear(8, 4)
            self.token = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.down(torch.relu(self.up(x + self.token)))

    model = Model()
    moram.inject(model, moram.MoRAMConfig(targets=("up",)))
    model.token.requires_grad_(True)
    moram.save(model, tmp_path)
    message = (
        "PEFT cannot load token, which was trained with this adapter: it takes whole modules "
        "alone; use moram.load(model, directory)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PeftModel.from_pretrained(Model(), tmp_path)


def test_importing_without_peft_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import moram.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "moram.peft needs PEFT, which is not installed: pip install 'moram[peft]'"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {message}"


def test_importing_the_library_imports_no_peft():
    code = "import sys, moram; moram.inject, moram.save; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_second_failed_adapter_leaves_the_first_as_it_was(base):
    model = get_peft_model(plain(base), config())
    expected, before = logits(model), describe(model)
    with pytest.raises(ValueError, match="matches no module"):
        model.add_adapter("second", config(target_modules=["nope"]))
    assert_untouched(model, before)
    assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]
