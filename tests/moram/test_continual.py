"""Metrics, streams on disk, the data that ships, the command line."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import moram
from moram.cli import main
from moram.continual import (
    Example,
    backward_transfer,
    forgetting,
    load_stream,
    majority_accuracy,
    overall_performance,
    plasticity,
)

TASKS = ("topic", "feeling", "purpose")
# Row t: after task t. Task 0 peaks after task 1, task 1 is forgotten, task 2 is last.
MATRIX = [[80.0, 30.0, 20.0], [96.0, 90.0, 25.0], [70.0, 50.0, 84.0]]


def test_metrics_of_a_matrix_worked_out_by_hand():
    assert overall_performance(MATRIX) == pytest.approx(68.0)  # (70 + 50 + 84) / 3
    assert plasticity(MATRIX) == pytest.approx(254 / 3)  # 80, 90, 84
    assert backward_transfer(MATRIX) == pytest.approx(-25.0)  # (-10 - 40) / 2
    assert forgetting(MATRIX) == pytest.approx(33.0)  # (26 + 40) / 2


def test_backward_transfer_may_be_positive_and_forgetting_may_not():
    matrix = [[50.0, 0.0], [75.0, 60.0]]
    assert backward_transfer(matrix) == 25.0
    assert forgetting(matrix) == 0.0


def test_metrics_of_one_task():
    assert backward_transfer([[40.0]]) == forgetting([[40.0]]) == 0
    assert overall_performance([[40.0]]) == plasticity([[40.0]]) == 40.0


def test_metrics_leave_the_matrix_alone():
    matrix = [row[:] for row in MATRIX]
    for metric in (overall_performance, plasticity, backward_transfer, forgetting):
        metric(matrix)
    assert matrix == MATRIX


def test_majority_accuracy_is_the_share_of_the_most_frequent_answer():
    examples = [Example("p", answer) for answer in "ABBBC"]
    assert majority_accuracy(examples) == 60.0


def write_task(folder, name="one", **parts):
    rows = [{"prompt": "p", "answer": "a"}]
    (folder / name).mkdir()
    for part in ("train", "test"):
        content = parts.get(part, rows)
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name / f"{part}.json").write_text(text, encoding="utf-8")


def test_stream_is_read_in_the_order_of_the_names(tmp_path):
    write_task(tmp_path, "one", train=[{"prompt": "é?", "answer": "ü"}] * 2)
    write_task(tmp_path, "two")
    stream = load_stream(tmp_path, ["two", "one"])
    assert [task.name for task in stream] == ["two", "one"]
    assert stream[1].train == (Example("é?", "ü"),) * 2
    assert stream[1].test == (Example("p", "a"),)


@pytest.mark.parametrize("names", [[], ["one", "one"]], ids=["none", "repeated"])
def test_names_must_be_there_and_differ(tmp_path, names):
    write_task(tmp_path)
    message = f"tasks must be one or more different names, got {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_stream(tmp_path, names)


def test_missing_task_lists_the_present_ones(tmp_path):
    write_task(tmp_path, "b")
    write_task(tmp_path, "a")
    message = f"{tmp_path} has no task 'c' (no c/train.json); it has: a, b"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_stream(tmp_path, ["a", "c"])
    with pytest.raises(FileNotFoundError, match=r"it has: none"):
        load_stream(tmp_path / "nowhere", ["a"])


def test_missing_test_part_is_named(tmp_path):
    write_task(tmp_path, test=None)
    message = f"{tmp_path / 'one' / 'test.json'} does not exist"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_stream(tmp_path, ["one"])


GOOD = {"prompt": "p", "answer": "a"}
BAD_PARTS = {
    "no_json": ("[{", "is not JSON: "),
    "object": (GOOD, "must hold a non-empty list, got dict"),
    "empty": ([], "must hold a non-empty list, got list"),
    "no_answer": ([GOOD, {"prompt": "p"}], "entry 1 must be {"),
    "number": ([{"prompt": "p", "answer": 3}], "entry 0 must be {"),
    "empty_text": ([{"prompt": "", "answer": "a"}], "entry 0 must be {"),
    "no_object": ([GOOD, GOOD, "text"], "entry 2 must be {"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("case", BAD_PARTS)
def test_malformed_file_is_named_with_its_entry(tmp_path, case, part):
    content, message = BAD_PARTS[case]
    write_task(tmp_path, **{part: content})
    path = tmp_path / "one" / f"{part}.json"
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:? {re.escape(message)}"):
        load_stream(tmp_path, ["one"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_byte_order_mark_before_a_task_is_no_part_of_it(tmp_path, part):
    write_task(tmp_path)
    path = tmp_path / "one" / f"{part}.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (task,) = load_stream(tmp_path, ["one"])
    assert task.train == task.test == (Example("p", "a"),)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_half_a_surrogate_pair_in_a_task_is_named_with_its_entry(tmp_path, part, field):
    # As ASCII, JSON writes both halves of a pair; one alone is no character.
    whole = [{"prompt": "p \U0001f642", "answer": "a"}]
    write_task(tmp_path, train=whole, test=whole)
    assert load_stream(tmp_path, ["one"])[0].train[0].prompt == "p \U0001f642"
    path = tmp_path / "one" / f"{part}.json"
    path.write_text(json.dumps([GOOD, GOOD | {field: "ab\ud83d"}]), encoding="utf-8")
    message = (
        f"{path}: the {field} of entry 1 must hold whole characters, got '\\ud83d' in place 2: "
        "half of a surrogate pair"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_stream(tmp_path, ["one"])


def shipped():
    return load_stream(Path(moram.__file__).parent / "demo" / "data", TASKS)


def test_shipped_tasks_are_large_enough_and_share_their_answers():
    for task in shipped():
        assert len(task.train) >= 150 and len(task.test) >= 60, task.name
        for part in (task.train, task.test):
            counts = Counter(example.answer for example in part)
            assert set(counts) == set("ABCD"), task.name
            assert len(set(counts.values())) == 1, (task.name, counts)


def test_no_shipped_test_sentence_is_trained_on():
    def sentences(examples):
        found = [re.search(r"Text: (.*)\nAnswer:", e.prompt, re.DOTALL) for e in examples]
        return [re.sub(r"[^a-z0-9]+", " ", match[1].lower()).strip() for match in found]

    stream = shipped()
    trained = {s for task in stream for s in sentences(task.train)}
    for task in stream:
        tested = sentences(task.test)
        assert set(tested) & trained == set(), task.name
        assert len(set(tested)) == len(tested) == len(task.test), task.name
        assert all(len(s.split()) >= 3 for s in tested), task.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["serve"], "invalid choice: 'serve'"),
        (["demo", "--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["demo", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["demo", "--threads", "x"], "argument --threads: invalid int value: 'x'"),
        (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["demo", "--data", "x"], "--data needs --tasks: which of its tasks, in which order"),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_malformed_command_line_exits_with_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "topic,weather"], "has no task 'weather'"),
        (["--tasks", ""], "tasks must be one or more different names, got []"),
        (["--tasks", "topic,topic"], "tasks must be one or more different names"),
        (["--data", "nowhere", "--tasks", "a"], "nowhere has no task 'a'"),
        (["--dtype", "float64"], "dtype must be auto, bfloat16 or float32, got 'float64'"),
        (["--model", "/nowhere/at/all", "--atoms", "0"], "atoms_per_task must be >= 1, got 0"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
    ids=["missing", "none", "repeated", "data", "dtype", "atoms", "model"],
)
def test_bad_demo_setting_is_one_line_and_status_1(arguments, message, capsys, monkeypatch):
    def start(*_):
        raise AssertionError("the demo started in spite of a bad setting")

    monkeypatch.setattr("moram.demo.run.fetch_weights", start)
    assert main(["demo", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moram demo: ") and message in error
