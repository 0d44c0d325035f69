"""A run over image domains that is stopped or killed anywhere goes on to the same end."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from choices import TRAINED, Choices, answers_of, assert_same_answers
from tiny_models import assert_equal
from xtail_support import (
    DOMAINS,
    NAMES,
    STEPS,
    quick,
    run,
    steps_of,
    write_backbone,
    write_domains,
)

from moram.cli import main
from moram.harness import run as harness
from moram.methods.train import TaskTrainer
from moram.xtail.run import Stopped, XtailRun

METHODS = ["moram", "lora", "codyra", "moe-adapters", "dac", "lada", "rail-primal"]
every_method = pytest.mark.parametrize("method", METHODS)
PROTECTED = {"temperature": 0.3, "value_scale": 4.0, "protect": 0.9, "protect_size": 4}
# Dropout shows whether a run that goes on draws what it would have drawn.
DROPOUT = {"moram": {"dropout": 0.1}, "lora": {"dropout": 0.1}, "codyra": {"dropout": 0.1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a method's undisturbed run, made when first asked for."""
    found, root = {}, tmp_path_factory.mktemp("whole")

    def get(method):
        if method not in found:
            run(data, root / method, method, **DROPOUT.get(method, {}))
            found[method] = root / method
        return found[method]

    return get


def outcome(out):
    """R, all answers, and every step's loss, as written."""
    results = json.loads((out / "results.json").read_text())
    given = {p.name: json.loads(p.read_text()) for p in sorted((out / "predictions").iterdir())}
    steps = steps_of(out) if (out / "steps.csv").exists() else None
    kept = {key: results[key] for key in ("complete", "matrix", "untrained", "summary")}
    return kept, given, steps


def assert_same_end(out, expected):
    assert outcome(out) == outcome(expected)
    actual, wanted = (torch.load(o / "state.pt", weights_only=True) for o in (out, expected))
    for key in ("stage", "finished", "adapters", "method"):
        assert_equal(actual[key], wanted[key])
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in expected.iterdir())


def stop_after(count):
    """Asks to stop at the count-th question."""
    asked = []
    return lambda: asked.append(True) or len(asked) == count


# The question is asked before each of 3 answers of the untrained model, after each of 6 steps, and
# before each of 3 answers after them.
MOMENTS = {
    "before-anything": 1,
    "first-step": 3 + 1,
    "last-step-of-the-first-task": 3 + STEPS,
    "between-answers": 3 + STEPS + 2,
    "in-the-second-task": 3 + STEPS + 3 + 4,
    "before-the-last-answer": 3 + 3 * (STEPS + 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "rail-primal"])
def test_a_stop_goes_on_to_the_same_end(data, whole, tmp_path, method, moment):
    out, changes = tmp_path / "out", DROPOUT.get(method, {})
    with pytest.raises(Stopped, match="the same command goes on from here"):
        run(data, out, method, stop_after(MOMENTS[moment]), **changes)
    assert not (out / "table.md").exists()
    run(data, out, method, **changes)
    assert_same_end(out, whole(method))


@pytest.mark.parametrize("count", [1, 4, 5, 8, 12])
def test_rail_stops_between_answers_and_goes_on_to_the_same_end(data, whole, tmp_path, count):
    out = tmp_path / "out"
    with pytest.raises(Stopped, match="between two tasks"):
        run(data, out, "rail-primal", stop_after(count))
    run(data, out, "rail-primal")
    assert_same_end(out, whole("rail-primal"))


@every_method
def test_a_run_that_stops_again_and_again_comes_to_the_same_end(data, whole, tmp_path, method):
    out, stops = tmp_path / "out", 0
    while stops < 30:
        try:
            run(data, out, method, stop_after(4), **DROPOUT.get(method, {}))
            break
        except Stopped:
            stops += 1
    # A stop after a step keeps 4 of the 12 answers and 18 steps, one before an answer 3 of them:
    # 4 4 3 4 3 4 4 3, and 1 is left. RAIL has answers alone: 3 3 3, and 3 are left.
    assert stops == (3 if method == "rail-primal" else 8)
    assert_same_end(out, whole(method))


def test_protected_keys_go_on_to_the_same_end(data, tmp_path):
    for name, count in (("whole", 0), ("out", MOMENTS["in-the-second-task"])):
        changes = {"method_args": PROTECTED, "dropout": 0.1}
        if count:
            with pytest.raises(Stopped):
                run(data, tmp_path / name, stop=stop_after(count), **changes)
        run(data, tmp_path / name, **changes)
    assert_same_end(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("name", ["write_state", "write_json"])
@every_method
def test_a_crash_while_writing_leaves_the_last_whole_file(
    data, whole, tmp_path, monkeypatch, method, name
):
    out, changes = tmp_path / "out", DROPOUT.get(method, {})
    original, calls = getattr(harness, name), []
    # The second state is the second task's; the seventh file of JSON an answer of the first's.
    last = 2 if name == "write_state" else 7

    def crash(path, value):
        calls.append(path)
        if len(calls) == last:
            # What a full disk leaves behind: half a temporary file.
            Path(path).with_name(f".{Path(path).name}.tmp").write_bytes(b"half")
            raise OSError("No space left on device")
        original(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(harness, name, crash)
        with pytest.raises(OSError, match="No space left"):
            run(data, out, method, **changes)
    run(data, out, method, **changes)
    # Taken over by the next file of that name, or left where none comes.
    for path in out.rglob(".*.tmp"):
        path.unlink()
    assert_same_end(out, whole(method))


@every_method
def test_a_finished_run_trains_and_answers_nothing(data, whole, tmp_path, monkeypatch, method):
    out = tmp_path / "out"
    shutil.copytree(whole(method), out)
    settings = json.loads((out / "config.json").read_text()) | {"out": str(out)}
    (out / "config.json").write_text(json.dumps(settings))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_):
        raise AssertionError("a finished run works again")

    for owner, function in ((TaskTrainer, "run"), (XtailRun, "score_task"), (XtailRun, "load")):
        monkeypatch.setattr(owner, function, fail)
    assert run(data, out, method, **DROPOUT.get(method, {}))["complete"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def stopped(data, out, count=MOMENTS["in-the-second-task"], **changes):
    """A run that was stopped in its second task."""
    with pytest.raises(Stopped):
        run(data, out, "lora", stop_after(count), **changes)


def test_finished_tasks_of_an_unfinished_run_are_not_trained_again(data, tmp_path, monkeypatch):
    stopped(data, tmp_path / "out")
    trained, original = [], TaskTrainer.run

    def note(trainer, on_step):
        trained.append((trainer.index, trainer.done))
        original(trainer, on_step)

    monkeypatch.setattr(TaskTrainer, "run", note)
    run(data, tmp_path / "out", "lora")
    assert trained == [(1, 4), (2, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "lr: 0.01 -> 0.02"),
        ({"shots": 4}, "shots: 3 -> 4"),
        ({"text_loss": False}, "text_loss: True -> False"),
        ({"datasets": NAMES[::-1]}, "datasets: .*'fruit'.* -> .*'tools'"),
        ({"method_args": {"alpha": 4}}, "method_args: .* -> {'alpha': 4}"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"eval_limit": 2}, "eval_limit: None -> 2"),
        ({"skip_bad": True}, "skip_bad: False -> True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_with_other_settings_is_refused_by_name(data, tmp_path, changes, message):
    stopped(data, tmp_path / "out", 2)
    with pytest.raises(ValueError, match=f"holds a run with other settings.*{message}"):
        run(data, tmp_path / "out", "lora", **changes)
    run(data, tmp_path / "out", "lora")


def test_settings_that_change_no_result_may_change(data, whole, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(data, out, stop=stop_after(MOMENTS["in-the-second-task"]), **DROPOUT["moram"])
    free = {"eval_batch": 7, "save_seconds": 0.0, "label": "mine", "workers": 2, "cache_gib": 0.0}
    # Other batches are scored: rounding alone may turn an answer.
    with Choices(TRAINED) as choices:
        run(data, out, **DROPOUT["moram"], **free)
    expected = whole("moram")
    assert steps_of(out) == steps_of(expected)
    if assert_same_answers(answers_of(out), answers_of(expected), choices):
        assert outcome(out) == outcome(expected)


def test_answers_of_a_model_that_is_gone_are_not_given_by_a_later_one(data, tmp_path):
    stopped(data, tmp_path / "out")
    lost = tmp_path / "out" / "predictions" / "results-0-1-birds.json"
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name} is gone, and so is the model"):
        run(data, tmp_path / "out", "lora")


def test_a_run_without_its_state_does_not_train_again_beside_old_answers(data, tmp_path):
    stopped(data, tmp_path / "out")
    (tmp_path / "out" / "state.pt").unlink()
    with pytest.raises(ValueError, match=r"holds answers of trained models, but its state\.pt is"):
        run(data, tmp_path / "out", "lora")


def test_ctrl_c_saves_and_the_same_command_goes_on(data, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    backbone = write_backbone(tmp_path / "clip")
    given = quick(data, out, backbone=backbone)
    for name in ("out", "quiet", "datasets"):
        given.pop(name)

    def command(folder):
        sets = [part for k, v in given.items() for part in ("--set", f"{k}={json.dumps(v)}")]
        return ["xtail", "--tasks", ",".join(DOMAINS), "--out", str(folder), "--quiet", *sets]

    assert main(command(whole)) == 0
    steps, original = [], TaskTrainer._step

    def interrupt(trainer):
        steps.append(trainer.done)
        if len(steps) == STEPS + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_step", interrupt)
        assert main(command(out)) == 130
    assert "stopped in task 2, step 2" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert main(command(out)) == 0
    assert_same_end(out, whole)
