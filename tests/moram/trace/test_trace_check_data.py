"""`moram trace check-data`: what is there, what is missing and where that comes from."""

import json

import pytest
from trace_support import TASKS, write_data

from moram.cli import main
from moram.trace.check_data import check_data
from moram.trace.protocol import SUITES, origin_of, tasks_of


def checked(root, names=None):
    lines = []
    return check_data(root, names, lines.append), lines


def test_complete_tasks_are_counted_and_described(tmp_path):
    problems, lines = checked(write_data(tmp_path), TASKS)
    assert problems == 0 and len(lines) == 2 * len(TASKS) + 1
    assert lines[0].startswith("letters: OK, 16 train and 16 test examples, scored by accuracy")
    # Both files hold the same examples.
    assert lines[1] == "  note: prompts of the test that are trained on: 16"
    assert lines[-1] == f"3 of 3 tasks are complete in {tmp_path}"


def test_what_is_missing_is_named_with_its_origin(tmp_path):
    write_data(tmp_path, ("amazon", "mine"))
    (tmp_path / "amazon" / "train.json").unlink()
    (tmp_path / "mine" / "test.json").unlink()
    problems, lines = checked(tmp_path, ("amazon", "mine", "FOMC"))
    assert problems == 3
    assert "  missing: train, from https://github.com/cmnfriend/O-LoRA, in TRACE's format" in lines
    assert "  missing: test" in lines
    assert "  missing: train, test, from https://github.com/BeyonderXX/TRACE" in lines


def test_a_file_of_another_form_is_a_problem_and_a_repeated_prompt_a_note(tmp_path):
    write_data(tmp_path, ("broken", "twice"))
    (tmp_path / "broken" / "test.json").write_text("[1]")
    rows = [{"prompt": "a", "answer": "b"}] * 3
    (tmp_path / "twice" / "train.json").write_text(json.dumps(rows))
    problems, lines = checked(tmp_path, ("broken", "twice"))
    assert problems == 1 and "entry 0 must be" in lines[0]
    assert "  note: prompts of train that stand there once more: 2" in lines


def test_nothing_there_is_eight_problems_of_trace(tmp_path):
    problems, lines = checked(tmp_path / "absent")
    assert problems == 8 and "0 of 8 tasks are complete" in lines[-1]


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_of_a_suite_has_an_origin(suite):
    assert all(origin_of(task).startswith("https://") for task in tasks_of(suite))


def test_the_command_says_by_its_exit_status_whether_all_is_well(tmp_path, capsys):
    write_data(tmp_path)
    command = ["trace", "check-data", str(tmp_path), "--tasks"]
    assert main([*command, "letters, sizes"]) == 0
    assert "2 of 2 tasks are complete" in capsys.readouterr().out
    assert main([*command, "letters,other"]) == 1
