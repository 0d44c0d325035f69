"""Settings in words: every one has a default, what a preset sets, and a meaning."""

import json
import re
from dataclasses import dataclass, field, fields

import pytest

from moram import MoRAMConfig
from moram.cli import main
from moram.demo.settings import DemoSettings
from moram.harness.describe import describe, meanings
from moram.methods import TrainSettings
from moram.trace.settings import PRESETS, TraceSettings
from moram.xtail.settings import XtailSettings


@dataclass
class Oven:
    """How bread is baked.

    Args:
        heat: of the oven, in degrees, and never more
            than 300.
        time, rest*: minutes. steam: whether there is any.
    Raises:
        ValueError: rest: is no setting here.
    """

    heat: int = 220
    time: int = 40
    rest: int | dict = 10
    steam: bool = False


@dataclass
class Bakery:
    """What a bakery decides.

    A setting marked * may be a dict.

    It opens early.

    Args:
        heat, time: as in `Oven`, for every loaf.
        name: as it is written: over the door. open: whether it is.
    """

    heat: int = 220
    time: int = 40
    name: str = ""
    open: bool = True


@dataclass
class Branch(Bakery):
    """One of several bakeries.

    Args:
        name: the street.
        loaves*: baked a day.
    """

    name: str = "x"
    loaves: dict = field(default_factory=dict)


def words(kind, *related):
    return {name: meaning.text for name, meaning in meanings(kind, related).items()}


def test_meanings_are_the_entries_of_the_docstring():
    assert words(Oven) == {
        "heat": "of the oven, in degrees, and never more than 300.",
        "time": "minutes.",
        "rest": "minutes.",
        "steam": "whether there is any.",
    }
    assert meanings(Oven)["rest"].name == "rest*"


def test_a_class_says_more_of_a_field_than_its_base():
    assert words(Branch) == {
        "heat": "as in `Oven`, for every loaf.",
        "time": "as in `Oven`, for every loaf.",
        "name": "the street.",
        "open": "whether it is.",
        "loaves": "baked a day.",
    }


def test_what_a_meaning_refers_to_takes_its_place():
    found = words(Bakery, Oven)
    assert found["heat"] == "of the oven, in degrees, and never more than 300, for every loaf."
    assert found["time"] == "minutes, for every loaf."
    assert found["name"] == "as it is written: over the door."


def test_a_class_without_a_docstring_has_no_meanings():
    @dataclass
    class Silent:
        value: int = 0

    assert meanings(Silent) == {}


def test_a_description_has_defaults_what_a_preset_sets_and_meanings():
    presets = {"paper": {"*": {}}, "night": {"*": {"time": 60}, "rye": {"heat": 180, "time": 90}}}
    text = describe(Bakery, presets, "night", "rye", related=(Oven,), width=40)
    assert text == (
        "A setting marked * may be a dict.\n"
        "It opens early.\n"
        "\n"
        "heat = 220\n"
        "    in night: 180\n"
        "    of the oven, in degrees, and never\n"
        "    more than 300, for every loaf.\n"
        "\n"
        "time = 40\n"
        "    in night: 90\n"
        "    minutes, for every loaf.\n"
        "\n"
        'name = ""\n'
        "    as it is written: over the door.\n"
        "\n"
        "open = true\n"
        "    whether it is."
    )
    assert "in night: 60" in describe(Bakery, presets, "night", "wheat")
    assert "\nloaves* = {}\n    baked a day." in describe(Branch, presets, "paper", "rye")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"^preset must be one of paper, night, got 'noon'$"):
        describe(Bakery, {"paper": {}, "night": {}}, "noon", "rye")


@pytest.mark.parametrize(
    "kind", [TraceSettings, XtailSettings, DemoSettings, TrainSettings, MoRAMConfig]
)
def test_every_setting_has_a_meaning(kind):
    found = words(kind, *({TrainSettings, MoRAMConfig} - {kind}))
    assert [item.name for item in fields(kind) if not found.get(item.name)] == []


@pytest.mark.parametrize(
    ("command", "kind", "preset", "method"),
    [
        ("trace", TraceSettings, "paper", "moram"),
        ("trace", TraceSettings, "small", "ewc"),
        ("xtail", XtailSettings, "small", "moe-adapters"),
    ],
)
def test_a_command_lists_every_setting_once_and_runs_nothing(
    capsys, tmp_path, monkeypatch, command, kind, preset, method
):
    monkeypatch.chdir(tmp_path)
    chosen = ["--preset", preset, "--method", method, "--settings"]
    assert main([command, *chosen]) == 0
    said = capsys.readouterr().out
    listed = re.findall(r"^(\w+)\*? = (.*)$", said, flags=re.M)
    made = kind(**{"model": "m", "data": "d"} if command == "trace" else {"datasets": "dtd"})
    assert [name for name, _ in listed] == [item.name for item in fields(kind)]
    # These have no default of their own, or one that another setting completes.
    given = {"model", "data", "tasks", "datasets"}
    plain = made.to_dict()
    assert {n: json.loads(text) for n, text in listed if n not in given} == {
        name: value for name, value in json.loads(json.dumps(plain)).items() if name not in given
    }
    assert list(tmp_path.iterdir()) == []
    assert said.splitlines()[-1].startswith(f"method_args of {method}: ")


def test_what_the_small_preset_sets_for_a_method_is_listed(capsys):
    assert main(["trace", "--settings", "--preset", "small", "--method", "ewc"]) == 0
    said = capsys.readouterr().out
    assert '\nmethod_args = {}\n    in small: {"fisher_examples": 64}\n' in said
    assert "\nlr = 0.0005\n    in small: 0.002\n    peak learning rate of AdamW" in said
    assert PRESETS["small"]["*"]["lr"] == 0.002
