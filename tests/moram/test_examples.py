"""The examples do what the harness does, through the public interface alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trace_support import TASKS, settings_for, write_data, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moram
from moram.examples import learn_tasks
from moram.trace.run import run_trace


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    return write_model(folder / "model"), write_data(folder / "data")


def read(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs[0])
    folders = [Path(inputs[1]) / task for task in TASKS]
    return [[learn_tasks.read(tokenizer, f, split) for split in ("train", "test")] for f in folders]


def learned(inputs, run):
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    moram.load(model, run / "adapters")
    return model


def test_tasks_learned_by_hand_are_those_of_the_harness(inputs, tmp_path):
    args = {"protect": 0.9, "value_scale": 8.0}
    # At a low rate rounding does not grow.
    settings = settings_for(*inputs, tmp_path, lr=0.002, method_args=args)
    run_trace(settings)
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    config = moram.MoRAMConfig(atoms_per_task=settings.rank, top_k=settings.rank, protect=0.9)
    train = settings.train_settings(TASKS[0])
    learn_tasks.learn(
        model, read(inputs), config, train.lr, train.epochs, train.batch_size, train.seed
    )
    expected = learned(inputs, tmp_path)
    assert moram.adapters(model).keys() == moram.adapters(expected).keys()
    for path, adapter in moram.adapters(model).items():
        state = moram.adapters(expected)[path].adapter_state()
        for name, tensor in adapter.adapter_state().items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5)


def test_tasks_are_scored_by_hand_as_by_the_harness(inputs, tmp_path):
    args = {"value_scale": 8.0}
    settings = settings_for(*inputs, tmp_path, epochs=12, tasks=TASKS[:2], method_args=args)
    expected = run_trace(settings)["matrix"][-1]
    model = learned(inputs, tmp_path)
    assert [learn_tasks.score(model, test) for _, test in read(inputs)[:2]] == expected
    assert max(expected) > 50


def test_the_example_runs_as_a_user_types_it(inputs, tmp_path):
    folders = [str(Path(inputs[1]) / task) for task in TASKS[:2]]
    command = [sys.executable, "-m", "moram.examples.learn_tasks", inputs[0], *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [len(row) for row in json.loads(done.stdout)] == [2, 2]
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    assert moram.load(model, tmp_path / "adapters")["tasks"] == list(TASKS[:2])


def test_an_example_uses_what_the_library_offers_alone():
    tree = ast.parse(Path(learn_tasks.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "moram"
    }
    assert used == {"MoRAMConfig", "inject", "task", "save"} <= set(moram.__all__)
