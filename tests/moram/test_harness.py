"""A third benchmark costs one file: what `toy_benchmark` gives is enough to run, stop and go on."""

import ast
import json
from pathlib import Path

import pytest
import torch
from tiny_models import assert_equal
from toy_benchmark import ToyRun, ToySettings, run_toy

import moram
from moram import checkpoint
from moram.harness.run import Stopped
from moram.methods import SequentialLoRA

METHODS = ("moram", "lora")
TASKS = ("north", "east", "south")
# Questions whether to stop: before each of 3 answers of the untouched model and of each stage, and
# after each of 3 epochs of 4 steps.
BEFORE, STEPS, ANSWERS = 3, 12, 3
# Package: what may import it. Each line may import those above it, and itself.
ORDER = ("methods", "harness", "trace", "xtail", "demo", "cli")
NEVER = {("xtail", "trace"), ("trace", "xtail")}


def settings_for(out, method="moram", **changes):
    return ToySettings.make("paper", method, changes=[{"out": str(out), "quiet": True}, changes])


def stop_after(count):
    """Asks to stop at the count-th question."""
    asked = []
    return lambda: asked.append(True) or len(asked) == count


@pytest.mark.parametrize("method", METHODS)
def test_a_third_benchmark_runs_through_the_harness_alone(tmp_path, method):
    results = run_toy(settings_for(tmp_path / "out", method))
    assert results["complete"] and results["tasks"] == list(TASKS)
    assert results["format"] == "toy" and len(results["untrained"]) == 3
    assert [len(row) for row in results["matrix"]] == [3, 3, 3]
    # The mean of the last row, and of the drops from the best of each earlier task's scores.
    matrix = results["matrix"]
    drops = [max(row[i] for row in matrix[i:]) - matrix[-1][i] for i in (0, 1)]
    expected = {"last": sum(matrix[-1]) / 3, "forgetting": sum(drops) / 2}
    assert results["summary"] == pytest.approx(expected)
    # Half of the points are right by chance.
    assert min(matrix[t][t] for t in range(3)) > 70
    # Rank or atoms 8: (3 + 16) and (16 + 2) numbers each.
    assert [cost["trained"] for cost in results["costs"]] == [8 * (19 + 18)] * 3
    steps = (tmp_path / "out" / "steps.csv").read_text().splitlines()
    assert len(steps) == 1 + 3 * STEPS


@pytest.mark.parametrize("method", [*METHODS, "o-lora", "ewc"])
@pytest.mark.parametrize("count", [2, BEFORE + 5, BEFORE + STEPS + 2, BEFORE + STEPS + ANSWERS + 7])
def test_a_third_benchmark_goes_on_to_the_same_end(tmp_path, method, count):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = run_toy(settings_for(whole, method))
    with pytest.raises(Stopped, match="the same command goes on from here"):
        run_toy(settings_for(out, method), stop=stop_after(count))
    found = run_toy(settings_for(out, method))
    for key in ("matrix", "untrained", "summary"):
        assert found[key] == expected[key]
    states = [torch.load(path / "state.pt", weights_only=True) for path in (out, whole)]
    for key in ("stage", "finished", "adapters", "method"):
        assert_equal(states[0][key], states[1][key])


def test_a_third_benchmark_refuses_other_settings_and_other_examples(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run_toy(settings_for(out), stop=stop_after(1))
    with pytest.raises(ValueError, match=r"other settings.*lr: 0\.05 -> 0\.1"):
        run_toy(settings_for(out, lr=0.1))
    saved = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(saved | {"examples": "others"}))
    with pytest.raises(ValueError, match=f"the examples in drawn changed since {out} began"):
        run_toy(settings_for(out))


def test_a_third_benchmark_leaves_adapters_that_load(tmp_path):
    settings = settings_for(tmp_path / "out")
    run_toy(settings)
    saved = json.loads((tmp_path / "out" / "predictions" / "results-2-0-north.json").read_text())
    run = ToyRun(settings)
    run.load()
    assert checkpoint.load(run.model, tmp_path / "out" / "adapters")["tasks"] == list(TASKS)
    points = run.make_plan().stream[0].test
    assert run.model(points.inputs).argmax(1).tolist() == saved["results"]


def test_hooks_are_called_once_around_each_task(tmp_path, monkeypatch):
    calls = []
    for name in ("setup", "begin_task", "end_task"):
        original = getattr(SequentialLoRA, name)

        def note(method, model, *others, name=name, original=original):
            calls.append((name, *others[:1]))
            return original(method, model, *others)

        monkeypatch.setattr(SequentialLoRA, name, note)
    run_toy(settings_for(tmp_path / "out", "lora"))
    around = [(name, index) for index in range(3) for name in ("begin_task", "end_task")]
    assert calls == [("setup",), *around]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("moe-adapters", "moe-adapters is for CLIP models"),
        ("in-context", "in-context is for language models"),
    ],
)
def test_methods_for_other_models_are_refused(tmp_path, method, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        run_toy(settings_for(tmp_path / "out", method))
    assert method not in ToySettings.methods() and "task-lora" in ToySettings.methods()


def imported(path, package):
    """The packages of the library that a file imports, by their first name."""
    depth = len(path.relative_to(package).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [name.name for name in node.names]
            yield from (name.split(".")[0] for name in names)


def test_no_import_points_upwards():
    package, seen = Path(moram.__file__).parent, set()
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for other in set(imported(path, package)) & set(ORDER) if own in ORDER else ():
            # SmolLM2 and dtypes are the demo's.
            if (own, other) != ("trace", "demo"):
                assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {other}"
                assert (own, other) not in NEVER, f"{path} imports {other}"
            seen.add((own, other))
    assert {("harness", "methods"), ("trace", "harness"), ("xtail", "harness")} <= seen
