"""What a run of `moram trace` reads, says and writes, in one process and through the command."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from choices import TRAINED, Choices, answers_of, assert_same_answers
from support import ROOT
from trace_support import TASKS, settings_for, write_data, write_model

from moram.methods.train import TaskTrainer
from moram.trace.run import run_trace
from moram.trace.streams import read_stream

# 16 examples, batches of 4, two epochs.
STEPS = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return write_model(folder / "model"), write_data(folder / "data")


def steps_of(out):
    with open(out / "steps.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def losses_of(out):
    return [float(row[2]) for row in steps_of(out)[1:]]


def write_rows(folder, task, split, count, mark):
    """A file of examples that name their split."""
    rows = [{"prompt": f"{mark}{i}:", "answer": "AB"[i % 2]} for i in range(count)]
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / f"{split}.json").write_text(json.dumps(rows))


def prompts(examples):
    return [example.prompt for example in examples]


@pytest.mark.parametrize("decoding", ["forced", "generate"])
def test_a_quiet_run_prints_nothing(inputs, tmp_path, capfd, decoding):
    quick = {"epochs": 1, "eval_limit": 4, "decoding": decoding}
    run_trace(settings_for(*inputs, tmp_path / "out", **quick))
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if "torch/utils/_pytree.py" not in line]
    assert (said.out, lines) == ("", [])


def test_a_loud_run_without_a_terminal_draws_no_bar(inputs, tmp_path, capfd):
    run_trace(settings_for(*inputs, tmp_path / "out", quiet=False, epochs=1))
    said = capfd.readouterr()
    assert "ex/s" not in said.err and "%|" not in said.err and "\r" not in said.err
    assert "letters: 16 train, 16 test examples; longer than allowed: 0 prompts, 0 " in said.out
    assert "| MoRAM | 1 |" in said.out


@pytest.mark.parametrize("method", ["moram", "joint", "zero-shot"])
@pytest.mark.parametrize("untrained", [True, False])
def test_the_bar_of_a_terminal_ends_full(inputs, tmp_path, monkeypatch, method, untrained):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    changes = {"quiet": False, "untrained": untrained, "eval_limit": 3, "batch_size": 5}
    run_trace(settings_for(*inputs, tmp_path / "out", method, drop_last=False, **changes))
    last = terminal.getvalue().strip().splitlines()[-1]
    # 16 examples are 4 batches of up to 5, counted whole; 48 are 10.
    trained = {"moram": 3 * 2 * 4 * 5, "joint": 2 * 10 * 5, "zero-shot": 0}[method]
    answered = {"moram": 3 + 6 + 9, "joint": 9, "zero-shot": 9}[method]
    # What trains nothing is the untrained model, and answers once.
    answered += 9 * (untrained and method != "zero-shot")
    assert f" {trained + answered}/{trained + answered} " in last


def test_steps_has_one_row_a_step(inputs, tmp_path):
    seen, out = [], tmp_path / "out"
    original = TaskTrainer._step

    def step(trainer):
        loss = original(trainer)
        rate = trainer.optimizer.param_groups[0]["lr"]
        seen.append((str(trainer.index), str(trainer.done), f"{loss:.6g}", f"{rate:.6g}"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "_step", step)
        run_trace(settings_for(*inputs, out))
    header, *rows = steps_of(out)
    assert header == ["stage", "step", "loss", "lr", "seconds"]
    assert [tuple(row[:4]) for row in rows] == seen
    places = [(str(stage), str(step)) for stage in range(3) for step in range(STEPS)]
    assert [row[:2] for row in rows] == [list(place) for place in places]
    for stage in range(3):
        seconds = [float(row[4]) for row in rows[stage * STEPS :][:STEPS]]
        assert seconds == sorted(seconds) and seconds[-1] < 60
    # Linear: a warm-up of max(1, 8 // 10) steps to the peak, then down by a seventh a step.
    rates = [float(row[3]) for row in rows[:STEPS]]
    assert rates == pytest.approx([0.02 * part / 7 for part in (7, 7, 6, 5, 4, 3, 2, 1)], rel=1e-4)


def test_tensorboard_shows_loss_and_rate_of_each_step(inputs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    run_trace(settings_for(*inputs, out, tensorboard=True))
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    names = {f"{kind}/{stage}" for kind in ("loss", "lr") for stage in range(3)}
    assert set(board.Tags()["scalars"]) == names
    losses = [event.value for stage in range(3) for event in board.Scalars(f"loss/{stage}")]
    assert losses == pytest.approx(losses_of(out), rel=1e-4)
    assert [event.step for event in board.Scalars("lr/2")] == list(range(1, STEPS + 1))


def test_a_task_without_a_train_file_learns_from_eval(inputs, tmp_path):
    data = tmp_path / "data"
    for task in ("a", "b"):
        for split, count in (("train", 12), ("eval", 8), ("test", 4)):
            write_rows(data, task, split, count, f"{task} {split} ")
    (data / "b" / "train.json").unlink()
    changes = {"tasks": ("a", "b"), "train_split": {"b": "eval"}, "epochs": 1}
    settings = settings_for(inputs[0], data, tmp_path / "out", **changes)
    a, b = read_stream(settings)
    assert prompts(a.train)[0] == "a train 0:" and len(a.train) == 12
    assert prompts(b.train) == [f"b eval {i}:" for i in range(8)]
    assert prompts(b.test) == [f"b test {i}:" for i in range(4)]
    results = run_trace(settings)
    assert len(steps_of(tmp_path / "out")) == 1 + 12 // 4 + 8 // 4 and results["complete"]


def test_what_is_scored_may_be_the_eval_split(inputs, tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 6), ("eval", 5)):
        write_rows(data, "a", split, count, f"{split} ")
    changes = {"tasks": ("a",), "eval_split": "eval", "train_limit": 4, "eval_limit": 3}
    (a,) = read_stream(settings_for(inputs[0], data, tmp_path / "out", **changes))
    assert prompts(a.train) == [f"train {i}:" for i in range(4)]
    assert prompts(a.test) == [f"eval {i}:" for i in range(3)]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_held_out_examples_are_scored_and_never_trained_on(inputs, tmp_path, split):
    data = tmp_path / "data"
    write_rows(data, "a", split, 12, "")
    path = data / "a" / f"{split}.json"
    rows = json.loads(path.read_text())
    # One of the held-out examples is there twice.
    path.write_text(json.dumps([rows[-1], *rows]))
    changes = {"tasks": ("a",), "eval_split": "held-out", "held_out": 3, "batch_size": 3}
    settings = settings_for(
        inputs[0], data, tmp_path / "out", train_split={"a": split}, epochs=1, **changes
    )
    (a,) = read_stream(settings)
    assert prompts(a.test) == ["9:", "10:", "11:"]
    assert prompts(a.train) == [f"{i}:" for i in range(9)]
    trained, original = [], TaskTrainer.__init__

    def note(trainer, model, method, parts, *others):
        trained.extend(tuple(ids) for ids in parts.ids)
        original(trainer, model, method, parts, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "__init__", note)
        run_trace(settings)
    found = json.loads((tmp_path / "out" / "predictions" / "results-0-0-a.json").read_text())
    assert found["prompts"] == ["9:", "10:", "11:"]
    # One byte a token, from 4 on for "!": the prompts of what was trained on.
    begins = {tuple(ord(c) - 29 for c in prompt) for prompt in found["prompts"]}
    assert len(trained) == 9 and not any(ids[: len(b)] == b for ids in trained for b in begins)


@pytest.mark.parametrize("full", [True, False])
def test_a_full_matrix_has_every_cell(inputs, tmp_path, full):
    results = run_trace(settings_for(*inputs, tmp_path / "out", full_matrix=full))
    for t, row in enumerate(results["matrix"]):
        assert [score is not None for score in row] == [full or i <= t for i in range(3)]
    names = {path.name for path in (tmp_path / "out" / "predictions").iterdir()}
    cells = [(t, i) for t in range(3) for i in range(3) if full or i <= t]
    assert names == {f"results-{t}-{i}-{TASKS[i]}.json" for t, i in cells}


def test_the_matrix_is_what_scoring_the_written_answers_gives(inputs, tmp_path):
    results = run_trace(settings_for(*inputs, tmp_path / "out", decoding="generate", epochs=12))
    for t, row in enumerate(results["matrix"]):
        for i in range(t + 1):
            path = tmp_path / "out" / "predictions" / f"results-{t}-{i}-{TASKS[i]}.json"
            found = json.loads(path.read_text())
            pairs = zip(found["results"], found["labels"], strict=True)
            # Accuracy as TRACE counts it: the answer is the beginning of the text.
            right = [text.strip().startswith(label) for text, label in pairs]
            assert row[i] == pytest.approx(100 * sum(right) / 16)
    assert results["matrix"][0][0] > 50, "something should be learned"


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("method", ["moram", "lora", "moe-lora"])
def test_gradient_checkpointing_changes_no_loss(inputs, tmp_path, method):
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        changes = {"gradient_checkpointing": checkpointing, "dropout": 0.1}
        run_trace(settings_for(*inputs, out, method, **changes))
    expected = losses_of(tmp_path / "False")
    assert losses_of(tmp_path / "True") == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 3 * STEPS and expected[0] > 1.3 * expected[STEPS - 1]


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("average", ["token", "example"])
def test_the_micro_batch_changes_no_loss(inputs, tmp_path, micro_batch, average):
    for size in (None, micro_batch):
        changes = {"micro_batch": size, "average": average, "tasks": TASKS[:1]}
        run_trace(settings_for(*inputs, tmp_path / str(size), **changes))
    expected = losses_of(tmp_path / "None")
    assert losses_of(tmp_path / str(micro_batch)) == pytest.approx(expected, rel=1e-3)


def save_dequantised(folder, out):
    """A model whose weights are what four bits leave of those in another folder."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    coarse = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_changed = 0
    for path, module in coarse.named_modules():
        if hasattr(module.weight if hasattr(module, "weight") else None, "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(path).weight.data.copy_(weight)
            num_changed += 1
    assert num_changed == 2 * 7
    shutil.copytree(folder, out)
    model.save_pretrained(out)
    return str(out)


@pytest.mark.parametrize("method", ["moram", "lora"])
def test_a_four_bit_base_trains_and_scores_as_its_dequantised_weights_do(inputs, tmp_path, method):
    same = save_dequantised(inputs[0], tmp_path / "model")
    found = {}
    for name, folder, quantize in (("4", inputs[0], "nf4"), ("32", same, None)):
        # The base is scored before it is trained: see the note in moram.trace.model.
        changes = {"untrained": True, "full_matrix": True, "quantize": quantize}
        settings = settings_for(folder, inputs[1], tmp_path / name, method, **changes)
        with Choices(TRAINED) as choices:
            matrix = run_trace(settings)["matrix"]
        found[name] = matrix, losses_of(tmp_path / name), answers_of(tmp_path / name)
    assert found["4"][1] == pytest.approx(found["32"][1], rel=1e-3)
    if assert_same_answers(found["4"][2], found["32"][2], choices):
        assert found["4"][0] == found["32"][0]
    run_trace(settings_for(*inputs, tmp_path / "whole", method, untrained=True))
    assert losses_of(tmp_path / "whole")[0] != pytest.approx(found["4"][1][0], rel=1e-3)


def test_runs_share_hidden_states_only_where_their_bases_are_the_same(inputs, tmp_path):
    folder, data = write_model(tmp_path / "model", num_hidden_layers=3), inputs[1]
    cached, counts = {}, []
    for name, quantize in (("a", None), ("b", "nf4"), ("c", None)):
        changes = {"first_layer": 2, "cache_prefix": True, "quantize": quantize, "epochs": 1}
        run_trace(settings_for(folder, data, tmp_path / name, **changes), cached=cached)
        counts.append(len(cached))
        alone = tmp_path / f"{name} alone"
        run_trace(settings_for(folder, data, alone, **changes))
        assert losses_of(tmp_path / name) == losses_of(alone)
    # Train and test files hold the same texts here, one set a task.
    assert counts == [3, 6, 6]


def test_the_commands_work_end_to_end(inputs, tmp_path):
    def moram(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # The package under test, whatever else is installed.
        environment["PYTHONPATH"] = str(ROOT)
        return subprocess.run(
            [sys.executable, "-m", "moram", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    (tmp_path / "quick.yaml").write_text(
        "cache_prefix: false\nfirst_layer: 1\nrank: 4\nepochs: {'*': 2}\nbatch_size: 4\n"
        "max_prompt: 24\nmax_answer: 4\ndtype: float32\nthreads: 1\nlr: 2e-2\n"
    )
    for seed in (0, 1):
        common = ["trace", "--preset", "small", "--model", inputs[0], "--data", inputs[1]]
        common += ["--tasks", ",".join(TASKS), "--config", "quick.yaml", "--set", f"seed={seed}"]
        found = moram(*common, "--out", f"run{seed}", "--full-matrix", *(["--quiet"] * seed))
        assert found.returncode == 0, found.stderr
        assert ("| MoRAM | 1 |" in found.stdout) == (seed == 0)
        # No library speaks before the first line, nor later; and there is no terminal for a bar.
        assert found.stderr == ""
        assert seed or found.stdout.startswith("letters: 16 train, ")
    assert found.stdout == ""
    files = {path.name for path in (tmp_path / "run0").iterdir()}
    assert files == {
        *("config.json", "results.json", "state.pt", "steps.csv", "predictions", "adapters"),
        *("table.md", "table.csv", "table.tex", "matrix.png"),
    }
    both = moram("table", "run0", "run1", "--out", "tables")
    assert both.returncode == 0, both.stderr
    results = [json.loads((tmp_path / f"run{s}" / "results.json").read_text()) for s in (0, 1)]
    last = [row["matrix"][-1] for row in results]
    mean = [sum(scores) / 2 for scores in zip(*last, strict=True)]
    row = next(line for line in both.stdout.splitlines() if line.startswith("| MoRAM | 2 |"))
    cells = [cell.strip().split(" ± ")[0] for cell in row.split("|")[3:6]]
    assert [float(cell) for cell in cells] == pytest.approx(mean, abs=0.051)
    assert both.stderr == ""
    wrong = moram("trace", "--model", "/nowhere", "--data", inputs[1], "--tasks", "letters")
    assert wrong.returncode == 1 and wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("moram trace: model /nowhere is no folder")


def test_a_checkpoint_of_a_run_loads_into_the_base_and_answers_the_same(inputs, tmp_path):
    from transformers import AutoModelForCausalLM

    from moram import load

    run_trace(settings_for(*inputs, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.float32)
    load(model, tmp_path / "out" / "adapters")
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["adapters"]
    from moram import adapters

    found = adapters(model)
    assert found.keys() == state.keys()
    for path, adapter in found.items():
        for name, tensor in adapter.adapter_state().items():
            torch.testing.assert_close(tensor, state[path][name])
