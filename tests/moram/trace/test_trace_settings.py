"""Settings of `moram trace`: layers of files and changes, and what is refused."""

import dataclasses
import json
import re

import pytest

from moram.harness.compare import differences
from moram.harness.yaml_values import parse_change, read_yaml
from moram.trace.protocol import tasks_of
from moram.trace.settings import TraceSettings, make_settings

GIVEN = {"model": "m", "data": "d"}
TRACE = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds")
TRACE += ("20Minuten",)
# From the released runner and the comparison's code base, one number a task in TRACE's order.
SHORT, LONG = (2, 1, 3, 2, 1, 2, 2, 3), (5, 3, 7, 5, 3, 5, 5, 7)


def paper(method="moram", **changes):
    return make_settings("paper", method, changes=[GIVEN | changes])


def small(method="moram", **changes):
    return make_settings("small", method, changes=[GIVEN | {"model": "smollm2"} | changes])


def test_later_layers_win_preset_then_files_in_order_then_changes_in_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 0.1\nseed: 1\nclip: 2.0\nrank: 3\n")
    second.write_text("seed: 2\nclip: 3.0\nrank: 4\n")
    settings = make_settings(
        "paper", files=[first, second], changes=[GIVEN | {"clip": 4.0, "rank": 5}, {"rank": 6}]
    )
    assert (settings.lr, settings.seed, settings.clip, settings.rank) == (0.1, 2, 4.0, 6)
    assert settings.batch_size == 32


def test_the_method_named_last_brings_its_own_presets(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("method: ewc\n")
    assert make_settings("paper", files=[path], changes=[GIVEN]).method == "ewc"
    settings = make_settings("paper", files=[path], changes=[GIVEN, {"method": "lora"}])
    assert settings.method == "lora" and settings.lr == 1e-4


def test_a_dotted_key_changes_one_entry_and_method_args_are_added_to_the_presets():
    settings = paper(**{"method_args.top_k": 4, "epochs.FOMC": 9, "max_prompt.20Minuten": 7})
    expected = {"value_scale": 2.0, "temperature": 0.03, "threshold": 0.2, "top_k": 4}
    assert settings.method_args == expected
    assert settings.of("epochs", "FOMC") == 9 and settings.of("epochs", "C-STANCE") == 2
    assert settings.of("max_prompt", "MeetingBank") == 4096
    assert paper(method_args={"top_k": 4}).method_args == expected
    assert paper(epochs={"FOMC": 9, "*": 1}).epochs == {"FOMC": 9, "*": 1}


@pytest.mark.parametrize(
    ("key", "inner", "value", "others"),
    [("max_new_tokens", "FOMC", 4, 512), ("decoding", "FOMC", "forced", "generate")],
)
def test_a_dotted_key_of_a_single_value_leaves_it_to_the_other_tasks(key, inner, value, others):
    settings = paper(**{f"{key}.{inner}": value})
    assert settings.of(key, inner) == value
    assert settings.of(key, "Py150") == others


def test_presets_do_not_change_when_settings_made_from_them_do():
    for settings in (paper(**{"method_args.top_k": 4}), paper()):
        settings.method_args["threshold"] = 0.9
        settings.epochs["FOMC"] = 9
    assert paper().of("epochs", "FOMC") == 1
    assert paper().method_args == {"value_scale": 2.0, "temperature": 0.03, "threshold": 0.2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-3", ("lr", 0.001)),
        ("lr=-2E+1", ("lr", -20.0)),
        ("epochs={FOMC: 2, '*': 1}", ("epochs", {"FOMC": 2, "*": 1})),
        ("betas=[0.9, 1e-1]", ("betas", [0.9, 0.1])),
        ("method_args.top_k=4", ("method_args.top_k", 4)),
        ("quantize=null", ("quantize", None)),
        ("quiet=true", ("quiet", True)),
        ("tasks=FOMC,Py150", ("tasks", "FOMC,Py150")),
        ("out=a=b", ("out", "a=b")),
        ("tasks=infinity", ("tasks", "infinity")),
    ],
)
def test_a_change_is_read_as_yaml_whose_numbers_need_no_dot(text, expected):
    assert parse_change(text) == expected


@pytest.mark.parametrize("text", ["lr", "=3", "lr=[1", "lr={a: b: c}"])
def test_a_change_that_is_no_pair_is_refused(text):
    with pytest.raises(ValueError, match=re.escape("--set takes key=value")) as caught:
        parse_change(text)
    assert repr(text) in str(caught.value)


def test_a_file_may_write_numbers_without_a_dot(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-3\nmethod_args: {temperature: 3e-2}\nbetas: [9e-1, 0.5]\n")
    settings = make_settings("paper", files=[path], changes=[GIVEN])
    assert settings.lr == 0.001 and settings.betas == (0.9, 0.5)
    assert settings.method_args == {"temperature": 0.03, "value_scale": 2.0, "threshold": 0.2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [1", "is not YAML"),
        ("- lr", "must hold a mapping from setting to value"),
        ("", "must hold a mapping from setting to value"),
        ("1: 2", "must hold a mapping from setting to value"),
        ("model: \xe9", "is not YAML: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
        read_yaml(path)


def test_a_byte_order_mark_before_a_file_of_settings_is_no_part_of_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbflr: 0.5\n")
    assert read_yaml(path) == {"lr": 0.5}


def test_an_unknown_setting_is_refused_with_the_closest():
    with pytest.raises(ValueError, match="there is no setting 'epoch'; close: epochs"):
        paper(epoch=3)
    with pytest.raises(ValueError, match="there is no setting 'max_promt'; close: max_prompt"):
        paper(**{"max_promt.FOMC": 3})
    with pytest.raises(ValueError, match=r"there is no setting 'zzz'$"):
        paper(zzz=3)


def test_an_unknown_preset_and_a_file_of_another_preset_are_refused(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of paper, small, demo, got 'large'"):
        make_settings("large", changes=[GIVEN])
    with pytest.raises(ValueError, match="preset is 'paper', and a file asks for 'small'"):
        paper(preset="small")


COUNTS = ("rank", "batch_size", "eval_batch", "pad_multiple", "max_answer", "held_out")
COUNTS += ("first_layer", "seed", "no_repeat_ngram")
OPTIONAL = ("train_limit", "eval_limit", "threads", "micro_batch")
FLAGS = ("cache_prefix", "drop_last", "full_matrix", "untrained", "compile", "quiet")
FLAGS += ("gradient_checkpointing", "tensorboard", "shard", "fit_context")
WRONG_TYPES = {
    "number": {
        "values": ["fast", [1], None, True, {"*": 1.0}],
        "names": ("lr", "clip", "dropout", "repetition_penalty", "save_seconds"),
    },
    "count": {
        "values": ["8", 2.5, True, [1], {"FOMC": 1}],
        "names": [*COUNTS, *OPTIONAL],
    },
    "count by task": {
        "values": ["8", 2.5, True, [1], None, {"*": 2.5}, {3: 1, "*": 1}],
        "names": ("epochs", "max_prompt", "max_new_tokens"),
    },
    "flag": {
        "values": ["yes", 1, None, []],
        "names": FLAGS,
    },
    "text": {
        "values": [3, None, ["a"], {"a": 1}, True],
        "names": ("model", "data", "out", "label", "suite", "schedule", "average"),
    },
    "choice": {
        "values": [3, ["a"], "x", True, {"*": "x"}],
        "names": ("labels", "dtype", "rouge", "similarity", "eval_split", "quantize", "decoding"),
    },
    "names": {
        "values": [3, None, [3], {"a": 1}, True],
        "names": ("tasks", "exclude", "truncate_right", "targets"),
    },
    "mapping": {"values": [3, "eval", None, ["a"]], "names": ("train_split", "method_args")},
    "pair": {"values": [3, None, "x,y", [0.9], [0.9, "x"], [0.9, 1.0], True], "names": ("betas",)},
    "order": {"values": ["one", 1.5, True, 9], "names": ("order",)},
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, case in WRONG_TYPES.items() for name in case["names"]]
)
def test_a_setting_of_a_wrong_type_is_refused_by_its_name(name, kind):
    for value in WRONG_TYPES[kind]["values"]:
        with pytest.raises((TypeError, ValueError), match=rf"^(the keys of )?{name}\b.*(must|got)"):
            paper(**({"suite": "standard"} if kind == "order" else {}) | {name: value})


def test_every_setting_is_tried_with_a_wrong_type():
    tried = {name for case in WRONG_TYPES.values() for name in case["names"]}
    known = {item.name for item in dataclasses.fields(TraceSettings)}
    # These choose what the others start from, and are tried on their own.
    assert known - tried == {"method", "preset"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be finite and > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be finite and > 0, got nan"),
        ({"clip": float("inf")}, "clip must be finite and > 0, got inf"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be finite and > 0, got 0"),
        ({"save_seconds": -1}, "save_seconds must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be >= 0, got -1"),
        ({"epochs": {"FOMC": 1}}, r'epochs has no value for C-STANCE and no "\*"'),
        ({"epochs": {"FOMC": 0, "*": 1}}, "epochs of FOMC must be >= 1, got 0"),
        ({"decoding": {"FOMC": "beam", "*": "forced"}}, "decoding of FOMC must be one of"),
        ({"epochs": {"FOMD": 1, "*": 1}}, "epochs names tasks that are not in the stream: FOMD"),
        ({"train_split": {"FOMD": "eval"}}, "train_split names tasks that are not in the stream"),
        ({"truncate_right": ["Py15"]}, "truncate_right names tasks that are not in the stream"),
        ({"train_split": {"FOMC": "test"}}, "FOMC would be trained on what it is scored on"),
        ({"train_split": {"FOMC": "dev"}}, "train_split of FOMC must be one of train, eval, test"),
        ({"tasks": ["a", "b", "a"]}, "tasks must differ, got a, b, a"),
        ({"model": ""}, "model must be given"),
        ({"data": ""}, "data must be given"),
        ({"labels": "joined", "max_answer": 1}, "need max_answer >= 2"),
        ({"cache_prefix": True, "decoding": "forced"}, "cache_prefix needs .*first_layer > 0"),
        (
            {"cache_prefix": True, "first_layer": 2, "gradient_checkpointing": True},
            "cache_prefix needs .* no gradient_checkpointing",
        ),
        ({"suite": "glue"}, "suite must be one of trace, standard, large, got 'glue'"),
        ({"suite": "glue", "tasks": ["a"]}, "suite must be one of trace, standard, large"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paper(**changes)


def test_suites_have_their_published_orders():
    assert paper(suite="standard").tasks == ("dbpedia", "amazon", "yahoo", "agnews")
    assert paper(suite="standard", order=3).tasks == ("yahoo", "amazon", "agnews", "dbpedia")
    large = [paper(suite="large", order=order).tasks for order in (4, 5, 6)]
    assert paper(suite="large").tasks == large[0]
    assert [(tasks[0], tasks[-1], len(set(tasks))) for tasks in large] == [
        ("MNLI", "yahoo", 15),
        ("MultiRC", "yahoo", 15),
        ("yelp", "WiC", 15),
    ]
    assert set(large[0]) == set(large[1]) == set(large[2])


def test_an_order_that_the_suite_lacks_or_that_tasks_contradict_is_refused():
    with pytest.raises(ValueError, match=r"order of suite standard must be one of \(1, 2, 3\)"):
        paper(suite="standard", order=4)
    with pytest.raises(ValueError, match="suite trace has one order"):
        paper(order=1)
    with pytest.raises(ValueError, match="give either order or tasks, got a, b"):
        paper(suite="standard", order=2, tasks=("a", "b"))
    with pytest.raises(ValueError, match="suite must be one of"):
        tasks_of("glue")


def test_tasks_may_come_as_one_text():
    assert paper(tasks="FOMC, Py150,").tasks == ("FOMC", "Py150")
    assert paper(targets="q_proj,v_proj").targets == ("q_proj", "v_proj")
    assert paper(targets="auto").targets == "auto"
    assert paper(betas="0.8,0.7").betas == (0.8, 0.7)


def test_settings_survive_json():
    for settings in (paper(), small(), paper(suite="large", order=5, targets=["q_proj"])):
        saved = json.loads(json.dumps(settings.to_dict()))
        assert TraceSettings(**saved) == settings
        assert differences(settings, saved) == []


def test_differences_name_what_changes_results_and_nothing_else():
    saved = paper().to_dict()
    free = {"out": "o", "threads": 2, "quiet": True, "save_seconds": 5.0, "tensorboard": True}
    assert differences(paper(**free, eval_batch=7), saved) == []
    whole = paper(dropout=0.0).to_dict()
    assert differences(paper(dropout=0.0, micro_batch=4), whole) == []
    # With dropout, another micro-batch drops other inputs.
    assert differences(paper(micro_batch=4), saved) == ["micro_batch: 1 -> 4"]
    own = paper(method_args={"targets": ("q_proj",)})
    assert differences(own, json.loads(json.dumps(own.to_dict()))) == []
    changed = paper(lr=0.25, **{"method_args.threshold": 0.5})
    assert differences(changed, saved) == [
        "lr: 0.0005 -> 0.25",
        "method_args: {'value_scale': 2.0, 'temperature': 0.03, 'threshold': 0.2} -> "
        "{'value_scale': 2.0, 'temperature': 0.03, 'threshold': 0.5}",
    ]
    # A run of another version may have settings more or less.
    del saved["clip"]
    assert differences(paper(), saved | {"older": 1}) == ["clip: None -> 1.0", "older: 1 -> None"]
