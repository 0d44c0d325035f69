"""The examples do what the harness does, through the public interface alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trace_support import TASKS, settings_for, write_data, write_model
from transformers import AutoModelForCausalLM

import moram
from moram.examples import (
    learn_domains,
    learn_tasks,
    learn_with_peft,
    look_at_atoms,
    read_a_bank,
    serve,
    serve_users,
)
from moram.trace.run import run_trace


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    return write_model(folder / "model"), write_data(folder / "data")


def folders_of(inputs):
    return [str(Path(inputs[1]) / task) for task in TASKS]


def learned(inputs, run):
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    moram.load(model, run / "adapters")
    return model


def test_tasks_learned_by_hand_are_those_of_the_harness(inputs, tmp_path):
    args = {"protect": 0.9, "value_scale": 8.0}
    # At a low rate rounding does not grow.
    settings = settings_for(*inputs, tmp_path, lr=0.002, method_args=args)
    run_trace(settings)
    config = moram.MoRAMConfig(atoms_per_task=settings.rank, top_k=settings.rank, protect=0.9)
    train = settings.train_settings(TASKS[0])
    how = {"lr": train.lr, "epochs": train.epochs, "size": train.batch_size, "seed": train.seed}
    learner = learn_tasks.Learner(inputs[0], config, **how)
    for folder in folders_of(inputs):
        learner.learn(folder)
    model = learner.model
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
    learner = learn_tasks.Learner(inputs[0])
    learner.model = learned(inputs, tmp_path)
    assert [learner.score(folder) for folder in folders_of(inputs)[:2]] == expected
    assert max(expected) > 50


def test_the_example_runs_as_a_user_types_it(inputs, tmp_path):
    command = [sys.executable, "-m", "moram.examples.learn_tasks"]
    command += [inputs[0], *folders_of(inputs)[:2]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [len(json.loads(row)) for row in done.stdout.splitlines()] == [2, 2]
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    assert moram.load(model, tmp_path / "adapters")["tasks"] == list(TASKS[:2])


def test_a_clip_learns_a_second_domain_and_keeps_the_first():
    (first, _), (kept, second) = learn_domains.main()
    assert min(first, kept, second) > 90


def test_peft_and_a_trainer_learn_a_second_task_and_keep_the_first():
    (first, _), (kept, second) = learn_with_peft.main()
    assert min(first, kept, second) > 90


def test_sft_teaches_four_bits_a_third_task_and_keeps_the_others():
    from moram.examples import learn_with_sft

    (first, *_), (_, second, _), last = learn_with_sft.main()
    assert min(first, second, *last) > 80


def test_users_are_served_by_turns_each_by_their_own_adapter():
    written = serve_users.main()
    assert written[:2] == written[2:]
    for found, user in zip(written, serve_users.USERS, strict=False):
        # Of eight tokens that go on counting, most.
        wanted = serve_users.USERS[user][5:13].tolist()
        assert sum(a == b for a, b in zip(found[5:], wanted, strict=True)) >= 6


def test_a_loaded_adapter_writes_what_the_saved_one_does():
    written = serve.main()
    assert written[0] == written[1]
    # Of eight tokens that go on counting, most.
    right = [a == b for a, b in zip(written[0][5:], range(6, 14), strict=True)]
    assert sum(right) >= 6


def test_protected_atoms_leave_an_earlier_task_to_its_own():
    share = look_at_atoms.main()
    assert share.sum(1).tolist() == pytest.approx([100, 100])
    assert share[0, 0] > 75 and share[1, 1] > share[0, 1]


def test_every_backend_reads_a_bank_alike():
    errors = read_a_bank.main()
    assert errors.keys() >= {"reference", "torch"} and max(errors.values()) < 1e-5


@pytest.mark.parametrize("path", sorted(Path(learn_tasks.__file__).parent.glob("[!_]*.py")))
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert f"python -m moram.examples.{path.stem}" in ast.get_docstring(ast.parse(text))
    # The one that reads files and trains as the harness does is the longest.
    assert len(text.splitlines()) <= (90 if path.stem == "learn_tasks" else 60)


def test_an_example_uses_what_the_library_offers_alone():
    tree = ast.parse(Path(learn_tasks.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "moram"
    }
    assert used == {"MoRAMConfig", "inject", "task", "save"} <= set(moram.__all__)
