"""The demo from end to end, on a tiny model in place of the real one."""

import json

import pytest
import torch
from tiny_models import language_model
from toy_language import WordTokenizer, toy_stream

from moram import checkpoint
from moram.cli import main
from moram.demo import run as demo


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Arguments of a run over two toy tasks in TRACE's format."""
    for task in toy_stream():
        folder = tmp_path / "data" / task.name
        folder.mkdir(parents=True)
        for part in ("train", "test"):
            rows = [example._asdict() for example in getattr(task, part)]
            (folder / f"{part}.json").write_text(json.dumps(rows))
    tokenizer = WordTokenizer()
    monkeypatch.setattr(
        demo, "load_model", lambda folder, dtype: (language_model().eval(), tokenizer)
    )
    flags = {
        "data": tmp_path / "data",
        "tasks": "task0,task1",
        "model": tmp_path,
        "out": tmp_path / "out",
        "atoms": 4,
        "batch-size": 4,
        "dtype": "float32",
    }
    return ["demo", *(text for k, v in flags.items() for text in (f"--{k}", str(v)))]


def test_the_demo_learns_reports_saves_and_draws(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == ["sequential LoRA", "MoRAM"]
    for run in results["methods"].values():
        assert [len(row) for row in run["matrix"]] == [2, 2]
        assert len(set(run["trained"])) == 1
    lora, moram = results["methods"].values()
    assert lora["trained"] == moram["trained"]
    for text in ("majority class", "untrained", "after task0", "backward transfer", "forgetting"):
        assert text in printed
    assert "all 16 test predictions identical" in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for row in results["firing"]["share"]:
        assert sum(row) == pytest.approx(100, abs=1e-3)
    loaded = checkpoint.load(language_model().eval(), out / "adapters")
    assert loaded["tasks"] == ["task0", "task1"]


def test_a_reload_that_predicts_otherwise_is_reported(arguments, tmp_path, monkeypatch, capsys):
    load = checkpoint.load

    def damaged(model, directory):
        about = load(model, directory)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.neg_()
        return about

    monkeypatch.setattr(demo.checkpoint, "load", damaged)
    assert main(arguments) == 1
    assert "predict something else" in capsys.readouterr().err
    # What was measured before is not lost.
    assert "matrix" in (tmp_path / "out" / "results.json").read_text()


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
