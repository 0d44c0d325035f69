"""A Trainer learns tasks in a row as `moram.task` does by hand, and goes on where it stopped."""

import re

import pytest
import torch
from peft_support import banks, logits, peft_model, save_base
from task_support import seeded
from tiny_models import assert_equal
from trainer_support import TASKS, Stop, make_trainer, score

import moram
from moram import adapters
from moram.continual import backward_transfer, overall_performance
from moram.trainer import TaskCallback, train_tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def by_hand(base, tmp_path):
    model, matrix = peft_model(base), []
    for index, (name, data) in enumerate(TASKS.items()):
        trainer = make_trainer(model, data, str(tmp_path / name))
        batches = trainer.get_eval_dataloader(data)
        with moram.task(model, batches, generator=seeded(index)):
            trainer.train()
        matrix.append([score(model, other) for other in TASKS])
    return model, matrix


def test_tasks_in_a_row_are_those_by_hand_number_by_number(base, tmp_path):
    expected, matrix = by_hand(base, tmp_path / "hand")
    model = peft_model(base)
    found = train_tasks(model, TASKS, make_trainer, score, tmp_path / "run")
    assert_equal(banks(model), banks(expected))
    assert found.matrix == matrix
    assert found.summary()["overall_performance"] == overall_performance(matrix)
    assert found.summary()["backward_transfer"] == backward_transfer(matrix)
    assert model.peft_config["default"].tasks == list(TASKS)


@pytest.mark.parametrize("step", [1, 3], ids=["before a checkpoint", "after a checkpoint"])
def test_a_stopped_run_goes_on_inside_a_task_as_if_it_had_not_stopped(base, tmp_path, step):
    whole = peft_model(base)
    expected = train_tasks(whole, TASKS, make_trainer, score, tmp_path / "whole")

    def make_failing(model, data, folder):
        trainer = make_trainer(model, data, folder)
        if data is TASKS["second"]:
            trainer.add_callback(Stop(step))
        return trainer

    with pytest.raises(KeyboardInterrupt):
        train_tasks(peft_model(base), TASKS, make_failing, score, tmp_path / "run")
    model = peft_model(base, seed=9)
    found = train_tasks(model, TASKS, make_trainer, score, tmp_path / "run")
    assert_equal(banks(model), banks(whole))
    assert found.matrix == expected.matrix
    assert torch.equal(logits(model), logits(whole))


def test_a_finished_run_trains_nothing_again(base, tmp_path):
    first = peft_model(base)
    expected = train_tasks(first, TASKS, make_trainer, score, tmp_path)
    again = peft_model(base, seed=9)
    assert train_tasks(again, TASKS, None, None, tmp_path).matrix == expected.matrix
    assert_equal(banks(again), banks(first))
    message = (
        f"out must be empty or hold a run of these tasks, got {tmp_path}, which holds first, "
        "second, third"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_tasks(again, {"other": []}, None, None, tmp_path)


def test_the_callback_alone_makes_a_training_a_task(base, tmp_path):
    model = peft_model(base, protect=None)
    for name, data in TASKS.items():
        trainer = make_trainer(model, data, str(tmp_path / name), save_strategy="no")
        trainer.add_callback(TaskCallback())
        trainer.train()
    assert {a.bank.num_frozen for a in adapters(model).values()} == {8}
    assert all(a.bank.learned for a in adapters(model).values())
