"""Settings: defaults, presets, dictionaries, and one clear error for each wrong value."""

import json
import re
from dataclasses import FrozenInstanceError

import pytest

from moram import MoRAMConfig
from moram_kernels import SelfActivation

NAN, INF = float("nan"), float("inf")
WRONG_VALUES = [
    ("atoms_per_task", 0, "atoms_per_task must be >= 1, got 0"),
    ("top_k", 0, "top_k must be >= 1, got 0"),
    ("temperature", 0, "temperature must be finite and > 0, got 0"),
    ("temperature", INF, "temperature must be finite and > 0, got inf"),
    ("temperature", NAN, "temperature must be finite and > 0, got nan"),
    ("threshold", 1, "threshold must be in [0, 1) (0 turns it off), got 1"),
    ("threshold", -0.1, "threshold must be in [0, 1) (0 turns it off), got -0.1"),
    ("threshold", NAN, "threshold must be in [0, 1) (0 turns it off), got nan"),
    ("eps", 0.0, "eps must be finite and > 0, got 0.0"),
    ("value_scale", 0, "value_scale must be finite and > 0, got 0"),
    ("value_scale", -2.0, "value_scale must be finite and > 0, got -2.0"),
    ("value_scale", INF, "value_scale must be finite and > 0, got inf"),
    ("value_scale", NAN, "value_scale must be finite and > 0, got nan"),
    ("dropout", 1, "dropout must be in [0, 1), got 1"),
    ("dropout", -0.1, "dropout must be in [0, 1), got -0.1"),
    ("dropout", NAN, "dropout must be in [0, 1), got nan"),
    ("alignment", 1, "alignment must be in [0, 1), got 1"),
    ("alignment", -0.1, "alignment must be in [0, 1), got -0.1"),
    ("alignment", NAN, "alignment must be in [0, 1), got nan"),
    ("capacity", -1, "capacity must be >= 0, got -1"),
    ("backend", "cuda", "backend must be one of auto, reference, torch, triton, got 'cuda'"),
    ("precision", "tf32", "precision must be one of ieee, bf16x6, got 'tf32'"),
    (
        "atom_dtype",
        "int8",
        "atom_dtype must be one of float32, bfloat16, float16, float64, got 'int8'",
    ),
    ("targets", (), 'targets must name at least one projection or be "auto", got ()'),
]
WRONG_KINDS = [
    ("atoms_per_task", 2.0, "atoms_per_task must be an integer >= 1, got 2.0"),
    ("atoms_per_task", True, "atoms_per_task must be an integer >= 1, got True"),
    ("top_k", "8", "top_k must be an integer >= 1, got '8'"),
    ("temperature", "hot", "temperature must be a number, got 'hot'"),
    ("threshold", None, "threshold must be a number, got None"),
    ("eps", True, "eps must be a number, got True"),
    ("value_scale", "2", "value_scale must be a number, got '2'"),
    ("dropout", False, "dropout must be a number, got False"),
    ("alignment", None, "alignment must be a number, got None"),
    ("capacity", 1.5, "capacity must be an integer >= 0, got 1.5"),
    ("targets", ("q_proj", 3), "targets must be a tuple of non-empty strings, got ('q_proj', 3)"),
    ("targets", ("",), "targets must be a tuple of non-empty strings, got ('',)"),
    ("targets", None, "targets must be a tuple of non-empty strings, got None"),
    ("exclude", "lm_head", "exclude must be a tuple of non-empty strings, got 'lm_head'"),
    ("exclude", None, "exclude must be a tuple of non-empty strings, got None"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG_VALUES)
def test_value_out_of_range_is_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoRAMConfig(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), WRONG_KINDS)
def test_value_of_the_wrong_kind_is_named(name, value, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        MoRAMConfig(**{name: value})


def test_limits_of_the_ranges_are_allowed():
    config = MoRAMConfig(
        atoms_per_task=1, top_k=1, threshold=0, dropout=0, capacity=0, temperature=1, value_scale=1
    )
    assert (config.threshold, config.dropout, config.capacity) == (0, 0, 0)


def test_activation_carries_the_four_operator_settings():
    config = MoRAMConfig(top_k=3, temperature=0.5, threshold=0.1, eps=1e-6)
    assert config.activation == SelfActivation(3, 0.5, 0.1, 1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("trace", (8, 8, 0.03, 0.2, 2.0, 0.1)), ("xtail", (16, 16, 0.01, 0.2, 1.0, 0.0))],
)
def test_preset_has_the_published_settings(name, expected):
    config = MoRAMConfig.preset(name)
    assert expected == (
        config.atoms_per_task,
        config.top_k,
        config.temperature,
        config.threshold,
        config.value_scale,
        config.dropout,
    )


def test_preset_takes_changes():
    config = MoRAMConfig.preset("trace", top_k=2, targets=["q_proj", "v_proj"])
    assert (config.top_k, config.targets) == (2, ("q_proj", "v_proj"))
    assert config.value_scale == 2.0


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^preset must be one of trace, xtail, got 'lora'$"):
        MoRAMConfig.preset("lora")


def test_config_survives_json():
    config = MoRAMConfig(targets=["a", "b.*"], exclude=["c"], capacity=5, threshold=0.125)
    assert MoRAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_named_and_sorted():
    message = "^settings hold names this version does not know: a, z$"
    with pytest.raises(ValueError, match=message):
        MoRAMConfig.from_dict({"z": 1, "top_k": 2, "a": 1})


def test_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        MoRAMConfig().top_k = 3


def test_equal_configs_are_one_set_element():
    assert len({MoRAMConfig(targets=["q"]), MoRAMConfig(targets=("q",)), MoRAMConfig()}) == 2
