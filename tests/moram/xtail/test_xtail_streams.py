"""What a run over image domains draws, scores and says, with other streams, images and models."""

import io
import sys

import pytest
import torch
from PIL import Image
from tiny_models import hf_clip
from trace_support import write_data, write_model
from xtail_support import (
    NAMES,
    REFUSED,
    ROWS,
    SIDE,
    SMALL_ARGS,
    TEST,
    answers,
    run,
    settings_for,
    tokenize,
    write_domains,
)

from moram.cli import main
from moram.methods.train import TaskTrainer
from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.plan import XtailPlan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("domains"))


def drawn(data, **changes):
    """The training images of a plan, by dataset."""
    plan = XtailPlan(settings_for(data, "unused", **changes), log=lambda line: None)
    return {d.name: [d.train.name(i) for i in range(len(d.train))] for d in plan.stream}


def test_few_shot_draws_depend_on_neither_order_nor_method_nor_other_datasets(data):
    whole = drawn(data)
    assert [len(images) for images in whole.values()] == [12, 9, 6]
    assert drawn(data, datasets=NAMES[::-1]) == whole
    assert drawn(data, method="joint") == whole
    for name in NAMES:
        assert drawn(data, datasets=(name,)) == {name: whole[name]}
    other = drawn(data, seed=1)
    assert all(other[name] != whole[name] for name in NAMES)


def test_a_task_trains_on_its_drawn_images_alone(data, tmp_path, monkeypatch):
    seen, original = [], TaskTrainer.__init__

    def note(trainer, model, method, images, *others):
        seen.append([images.split.name(i) for i in range(len(images))])
        original(trainer, model, method, images, *others)

    monkeypatch.setattr(TaskTrainer, "__init__", note)
    run(data, tmp_path / "out", "lora")
    assert seen == list(drawn(data).values())
    seen.clear()
    run(data, tmp_path / "joint", "joint")
    assert seen == [[name for images in drawn(data).values() for name in images]]


def test_training_on_all_datasets_at_once_takes_the_steps_of_all(data, tmp_path, monkeypatch):
    seen, original = [], TaskTrainer.run

    def note(trainer, on_step):
        original(trainer, on_step)
        seen.append(trainer.done)

    monkeypatch.setattr(TaskTrainer, "run", note)
    run(data, tmp_path / "one", "lora")
    run(data, tmp_path / "all", "joint")
    assert seen == [6, 6, 6, 18]


def test_a_router_that_is_told_the_task_is_marked(data, tmp_path):
    arguments = SMALL_ARGS["moe-adapters"] | {"selection": "given"}
    found = run(data, tmp_path / "out", "moe-adapters", method_args=arguments)
    assert found["needs_task_id"]
    # What is not learned yet is scored by the untrained model.
    for t, row in enumerate(found["matrix"]):
        assert row[t + 1 :] == found["untrained"][t + 1 :]
    assert "; MoE-Adapters was told it." in (tmp_path / "out" / "table.md").read_text()


def test_another_order_of_datasets_offsets_labels_by_its_own(data, tmp_path):
    results = run(data, tmp_path / "out", "zero-shot", datasets=("tools", "fruit"))
    assert results["classes"] == [2, 4]
    found = answers(tmp_path / "out", 0, 1, ("tools", "fruit"))
    assert found["labels"] == [label for label in (2, 3, 4, 5) for _ in range(TEST)]


@pytest.mark.parametrize("limit", [1, 5, 12, 100])
def test_a_limit_takes_evenly_spaced_test_images(data, tmp_path, limit):
    results = run(data, tmp_path / "out", "zero-shot", eval_limit=limit)
    assert results["test_images"] == [min(limit, count) for count in (16, 12, 8)]
    # Of birds' 12 images, four a class.
    expected = {1: [4], 5: [4, 4, 5, 5, 6], 12: [4] * 4 + [5] * 4 + [6] * 4}
    assert answers(tmp_path / "out", 0, 1)["labels"] == expected.get(limit, expected[12])


@pytest.mark.parametrize("method", ["moram", "joint", "zero-shot", "rail-primal"])
@pytest.mark.parametrize("untrained", [True, False])
def test_the_bar_of_a_terminal_ends_full(data, tmp_path, monkeypatch, method, untrained):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    changes = {"quiet": False, "untrained": untrained, "log": lambda line: None}
    run(data, tmp_path / "out", method, **changes)
    last = terminal.getvalue().strip().splitlines()[-1]
    trained = {"moram": 3 * 6 * 4, "joint": 3 * 6 * 4, "rail-primal": 27}.get(method, 0)
    rows = ROWS.get(method, 3) + (untrained and method != "zero-shot")
    assert f" {trained + 36 * rows}/{trained + 36 * rows} " in last


def test_a_quiet_run_prints_nothing(data, tmp_path, capfd):
    run(data, tmp_path / "out", "rail-primal")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_run_logs_its_datasets_and_table(data, tmp_path):
    lines = []
    run(data, tmp_path / "out", "zero-shot", log=lines.append, quiet=False)
    assert "fruit: 4 classes, 12 train, 16 test images" in lines
    assert any(line.startswith("9 classes in all") for line in lines)
    assert "| zero-shot | 1 |" in lines[-1]


def test_one_dataset_alone_has_no_transfer(data, tmp_path):
    results = run(data, tmp_path / "out", "lora", datasets=("fruit",))
    (score,) = results["matrix"][0]
    expected = {"average": score, "last": score, "forgetting": 0}
    assert results["summary"] == pytest.approx(expected)


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_do_not_fit_are_refused_by_name(data, tmp_path, method):
    with pytest.raises(ValueError, match=f"{method} {REFUSED[method]}"):
        run(data, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rail-primal", "rail-dual", "moe-adapters", "dac", "lada"])
def test_methods_for_clip_alone_are_refused_by_trace(tmp_path, capsys, method):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    command = ["trace", "--preset", "small", "--model", model, "--data", data, "--tasks", "letters"]
    out = tmp_path / "out"
    assert main([*command, "--set", f"method={method}", "--out", str(out), "--quiet"]) == 1
    assert "CLIP" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "config.json").exists() and not list(out.glob("predictions/*"))


@pytest.mark.parametrize("side", [SIDE, 20])
def test_images_of_any_size_come_to_the_models_size(tmp_path, side):
    folder = write_domains(tmp_path / "data", ("tools",))
    for path in (tmp_path / "data").rglob("*.png"):
        Image.open(path).resize((2 * side, side)).save(path)
    assert run(folder, tmp_path / "out", "lora", datasets=("tools",))["complete"]


@pytest.mark.parametrize(
    "method", ["moram", "moe-adapters", "dac", "lada", "rail-primal", "zero-shot"]
)
def test_a_hugging_face_clip_runs_too(data, tmp_path, method):
    def tokens(texts):
        # Its vocabulary has 64 words, the last of which ends a text.
        return torch.where(tokenize(texts)[:, :8] == 511, 63, tokenize(texts)[:, :8] % 62)

    clip = Clip(hf_clip(), tokens, Preprocess(32, MEAN, STD))
    results = run(data, tmp_path / "out", method, clip=clip)
    assert results["complete"] and len(results["matrix"]) == ROWS.get(method, 3)


def test_without_a_terminal_progress_is_told_in_lines(data, tmp_path, monkeypatch):
    monkeypatch.setattr("moram.harness.progress.MINUTE", 1e-9)
    lines = []
    run(data, tmp_path / "out", "lora", log=lines.append, quiet=False)
    # Decoding is told of before, with a name.
    told = [line for line in lines if line.endswith("minutes to go") and line[0].isdigit()]
    assert told[-1].startswith("100 %, about 0 ")
    parts = [int(line.split(" ", 1)[0]) for line in told]
    assert parts == sorted(parts) and parts[0] < 20
