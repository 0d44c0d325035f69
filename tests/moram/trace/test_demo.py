"""The demo from end to end, on a tiny model in place of the real one."""

import json

import pytest
import torch
from trace_support import TASKS, write_data, write_model
from transformers import AutoModelForCausalLM

from moram import checkpoint
from moram.cli import main
from moram.trace import run as trace_run

NAMED = ",".join(TASKS[:2])


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run over two toy tasks in TRACE's format."""
    flags = {
        "data": write_data(tmp_path / "data"),
        "tasks": NAMED,
        "model": write_model(tmp_path / "model"),
        "out": tmp_path / "out",
        "atoms": 4,
        "batch-size": 4,
        "first-layer": 1,
        "dtype": "float32",
        "threads": 1,
    }
    return ["demo", *(text for k, v in flags.items() for text in (f"--{k}", str(v)))]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_demo_learns_reports_saves_and_draws(arguments, tmp_path, capsys, threads):
    # With two threads, both methods learn side by side.
    assert main([*arguments, "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == ["sequential LoRA", "MoRAM, protected"]
    for run in results["methods"].values():
        # A task that was not learned yet is not scored.
        assert [[score is None for score in row] for row in run["matrix"]] == [
            [False, True],
            2 * [False],
        ]
        assert len(set(run["trained"])) == 1
    lora, moram = results["methods"].values()
    assert lora["trained"] == moram["trained"]
    for text in ("majority class", "untrained", "backward transfer", "forgetting", "addition"):
        assert text in printed
    assert f"all {results['reloaded']} test predictions identical" in printed
    assert results["reloaded"] == 2 * 16
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for row in results["firing"]["share"]:
        assert sum(row) == pytest.approx(100, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = checkpoint.load(model, out / "moram" / "adapters")
    assert loaded["tasks"] == list(TASKS[:2])
    # The numbers are those of `moram trace` with the same settings.
    for method, run in (("lora", lora), ("moram", moram)):
        assert json.loads((out / method / "results.json").read_text())["matrix"] == run["matrix"]


def test_a_second_demo_starts_anew_and_finds_the_same(arguments, tmp_path):
    path = tmp_path / "out" / "results.json"
    found = []
    for _ in range(2):
        assert main(arguments) == 0
        found.append(json.loads(path.read_text()))
    assert found[0]["total_seconds"] != found[1]["total_seconds"]
    for first, second in zip(*(f["methods"].values() for f in found), strict=True):
        assert first["matrix"] == second["matrix"]


def test_without_protection_it_is_the_published_rule(arguments, tmp_path):
    assert main([*arguments, "--protect", "0"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"]) == ["sequential LoRA", "MoRAM"]


def test_a_reload_that_answers_otherwise_is_reported(arguments, tmp_path, monkeypatch, capsys):
    load = checkpoint.load

    def damaged(model, directory):
        about = load(model, directory)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()
        return about

    monkeypatch.setattr(trace_run.checkpoint, "load", damaged)
    assert main(arguments) == 1
    assert "otherwise" in capsys.readouterr().err
    # What was measured before is not lost.
    assert "matrix" in (tmp_path / "out" / "results.json").read_text()


def test_a_run_that_fails_beside_the_other_ends_the_demo(arguments, tmp_path, capsys):
    # The first method's folder is a file: its process cannot begin.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lora").write_text("")
    assert main([*arguments, "--threads", "2"]) == 1
    assert "the run of lora failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--epochs", "0", "epochs must be >= 1, got 0"),
        ("--batch-size", "0", "batch_size must be >= 1, got 0"),
        ("--lr", "-1", "lr must be finite and > 0, got -1.0"),
        ("--threads", "0", "threads must be >= 1, got 0"),
        ("--atoms", "0", "atoms_per_task must be >= 1, got 0"),
        ("--dtype", "int8", "dtype must be auto, bfloat16 or float32, got 'int8'"),
        ("--model", "/nowhere", "model must be a folder, /nowhere is none"),
    ],
)
def test_a_bad_setting_is_named_before_any_work(arguments, flag, value, message, capsys):
    assert main([*arguments, flag, value]) == 1
    assert message in capsys.readouterr().err
