"""A Trainer learns tasks in a row as `moram.task` does by hand, and goes on where it stopped."""

import re
import warnings
from types import SimpleNamespace

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


def test_one_trainer_begins_its_second_task_afresh(base, tmp_path):
    ways = []
    for fresh in (False, True):
        model, callback = peft_model(base, protect=None), TaskCallback(generator=seeded(3))
        for task in range(2):
            if fresh or not task:
                folder = str(tmp_path / f"{fresh} {task}")
                trainer = make_trainer(model, TASKS["first"], folder, save_strategy="no")
                trainer.add_callback(callback)
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                trainer.train()
        ways.append(banks(model))
    assert_equal(*ways)


def test_a_task_of_another_number_of_atoms_reaches_the_trainers_optimiser(base, tmp_path):
    ways = []
    for by_callback in (True, False):
        model = peft_model(base, protect=None)
        with moram.task(model, generator=seeded(1)):
            pass
        with moram.task(model, n=2, generator=seeded(2)):
            pass
        folder = str(tmp_path / f"{by_callback}")
        trainer = make_trainer(model, TASKS["first"], folder, save_strategy="no")
        if by_callback:
            trainer.add_callback(TaskCallback(generator=seeded(3)))
            trainer.train()
        else:
            with moram.task(model, generator=seeded(3)):
                trainer.train()
        assert {a.bank.num_frozen for a in adapters(model).values()} == {6}
        assert all(a.bank.current_values.any() for a in adapters(model).values())
        ways.append(banks(model))
    assert_equal(*ways)


def test_what_accelerate_cannot_deal_out_is_refused_before_it_tries(base, tmp_path, monkeypatch):
    def make(model, data, folder):
        trainer = make_trainer(model, data, folder)
        plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
        return trainer

    message = (
        "fsdp_config['cpu_ram_efficient_loading'] must be False, got True: accelerate then deals "
        "out parameters alone, and frozen atoms are buffers; leave it out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_tasks(peft_model(base), TASKS, make, score, tmp_path)
