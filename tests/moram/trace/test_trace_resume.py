"""A run that is stopped or killed anywhere goes on to the same end."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from trace_support import TASKS, settings_for, write_data, write_model

from moram.harness import run as harness
from moram.methods.train import TaskTrainer
from moram.trace import run as run_module
from moram.trace.run import Stopped, run_trace

PROTECTED = {"method_args": {"protect": 0.9, "protect_size": 8, "value_scale": 8.0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return write_model(folder / "model"), write_data(folder / "data")


def outcome(out):
    """R, all answers, and every step's loss, as written."""
    results = json.loads((out / "results.json").read_text())
    answers = {p.name: json.loads(p.read_text()) for p in sorted((out / "predictions").iterdir())}
    steps = [line.split(",")[:4] for line in (out / "steps.csv").read_text().splitlines()]
    return results["complete"], results["matrix"], answers, steps


def final_state(out):
    """All tensors of the last state."""
    state = torch.load(out / "state.pt", weights_only=True)
    return {
        f"{path}.{name}": tensor
        for path, tensors in state["adapters"].items()
        for name, tensor in tensors.items()
    }


def assert_same_end(out, whole):
    assert outcome(out) == outcome(whole)
    expected, actual = final_state(whole), final_state(out)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def run_quietly(settings):
    """A forked child: nothing it prints is of interest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run_trace(settings)


def test_ten_kills_at_random_points_end_in_the_same_r(inputs, tmp_path):
    changes = {"dropout": 0.1, "save_seconds": 0.0, "epochs": 24, **PROTECTED}
    whole = tmp_path / "whole"
    started = time.perf_counter()
    run_trace(settings_for(*inputs, whole, **changes))
    duration = time.perf_counter() - started
    out, draw, kills = tmp_path / "killed", random.Random(0), 0
    settings = settings_for(*inputs, out, **changes)
    # A fork has the libraries already: what is killed is the work, not the import of torch.
    context = multiprocessing.get_context("fork")
    while kills < 10:
        child = context.Process(target=run_quietly, args=(settings,))
        child.start()
        # A life is short beside the whole run, so that ten kills find it unfinished.
        child.join(0.2 + draw.uniform(0, duration / 10))
        if not child.is_alive():
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills == 10, f"the run ended after {kills} kills"
    assert not json.loads((out / "results.json").read_text())["complete"]
    run_trace(settings)
    assert_same_end(out, whole)


@pytest.mark.parametrize(
    "method", ["moram", "lora", "o-lora", "inf-lora", "lora-stack", "ewc", "tree-lora", "moe-lora"]
)
def test_a_stop_in_the_second_task_goes_on_to_the_same_end(inputs, tmp_path, method):
    changes = PROTECTED if method == "moram" else {}
    if method == "lora-stack":
        changes = {"method_args": {"protect": 0.9}}
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    run_trace(settings_for(*inputs, whole, method, dropout=0.1, **changes))
    asked = []

    def stop():
        asked.append(True)
        # 8 steps a task: the question is asked after each, and before each answer.
        return len(asked) == 12

    settings = settings_for(*inputs, out, method, dropout=0.1, **changes)
    with pytest.raises(Stopped, match="the same command goes on from here"):
        run_trace(settings, stop=stop)
    assert not json.loads((out / "results.json").read_text())["complete"]
    run_trace(settings)
    assert_same_end(out, whole)


@pytest.mark.parametrize("moment", ["before the state is replaced", "before the answers are kept"])
def test_a_crash_while_writing_leaves_the_last_whole_file(inputs, tmp_path, monkeypatch, moment):
    whole, out = tmp_path / "whole", tmp_path / "crashed"
    run_trace(settings_for(*inputs, whole))
    name = "write_state" if "state" in moment else "write_json"
    original, calls = getattr(harness, name), []

    def crash(path, value):
        calls.append(path)
        if len(calls) == 3:
            # What a full disk leaves behind: half a temporary file.
            Path(path).with_name(f".{Path(path).name}.tmp").write_bytes(b"half")
            raise OSError("No space left on device")
        original(path, value)

    settings = settings_for(*inputs, out)
    with monkeypatch.context() as patch:
        patch.setattr(harness, name, crash)
        with pytest.raises(OSError, match="No space left"):
            run_trace(settings)
    run_trace(settings)
    assert_same_end(out, whole)


def test_a_finished_task_is_never_trained_or_answered_again(inputs, tmp_path, monkeypatch):
    settings = settings_for(*inputs, tmp_path / "out")
    run_trace(settings)
    before = outcome(tmp_path / "out")

    def fail(*_):
        raise AssertionError("a finished run trains or answers again")

    monkeypatch.setattr(TaskTrainer, "run", fail)
    monkeypatch.setattr(run_module, "forced", fail)
    results = run_trace(settings)
    assert results["complete"] and outcome(tmp_path / "out") == before


def test_ctrl_c_saves_and_the_same_command_goes_on(inputs, tmp_path, monkeypatch, capsys):
    from moram.cli import main

    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    changes = settings_for(*inputs, whole)
    run_trace(changes)
    names = ("first_layer", "cache_prefix", "rank", "lr", "epochs", "batch_size", "max_prompt")
    names += ("train_limit", "max_answer", "pad_multiple", "max_new_tokens", "eval_batch", "dtype")
    given = [f"{name}={json.dumps(getattr(changes, name))}" for name in (*names, "threads")]
    command = ["trace", "--preset", "small", "--model", inputs[0], "--data", inputs[1], "--quiet"]
    command += ["--tasks", ",".join(TASKS), "--out", str(out)]
    command += [part for text in given for part in ("--set", text)]
    steps, original = [], TaskTrainer._step

    def interrupt(trainer):
        steps.append(trainer.done)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_step", interrupt)
        assert main(command) == 130
    assert "stopped in task 1, step 5" in capsys.readouterr().err
    assert main(command) == 0
    assert_same_end(out, whole)


def stop_after(count):
    """Asks to stop at the count-th question."""
    asked = []
    return lambda: asked.append(True) or len(asked) == count


def stopped(inputs, out, count=12):
    """A run that was stopped in its second task, and its settings."""
    settings = settings_for(*inputs, out, untrained=True)
    with pytest.raises(Stopped):
        run_trace(settings, stop=stop_after(count + len(TASKS)))
    return settings


def test_answers_of_a_model_that_is_gone_are_not_given_by_a_later_one(inputs, tmp_path):
    settings = stopped(inputs, tmp_path / "out")
    lost = tmp_path / "out" / "predictions" / "results-untrained-1-colours.json"
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name} is gone, and so is the model"):
        run_trace(settings)


def test_a_run_without_its_state_does_not_train_again_beside_old_answers(inputs, tmp_path):
    settings = stopped(inputs, tmp_path / "out")
    (tmp_path / "out" / "state.pt").unlink()
    with pytest.raises(ValueError, match=r"holds answers of trained models, but its state\.pt is"):
        run_trace(settings)


def test_a_run_does_not_go_on_with_other_examples(inputs, tmp_path):
    data = write_data(tmp_path / "data")
    settings = stopped((inputs[0], data), tmp_path / "out")
    write_data(tmp_path / "data", examples=18)
    with pytest.raises(ValueError, match=r"the examples in .* changed since"):
        run_trace(settings)


def test_no_finished_task_of_an_unfinished_run_is_trained_again(inputs, tmp_path, monkeypatch):
    settings, trained = stopped(inputs, tmp_path / "out"), []
    original = TaskTrainer.run

    def note(trainer, on_step):
        trained.append((trainer.index, trainer.done))
        original(trainer, on_step)

    monkeypatch.setattr(TaskTrainer, "run", note)
    run_trace(settings)
    assert [index for index, _ in trained] == [1, 2] and 0 < trained[0][1] < 8
