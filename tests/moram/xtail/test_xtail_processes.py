"""Two processes give the numbers of one: losses of whole batches, gradients, answers."""

import json
from pathlib import Path

import pytest
import torch
from choices import TRAINED, Choices, answers_of, assert_same_answers
from two_processes import launch
from xtail_support import run, settings_for, steps_of, write_domains

from moram.processes import Processes

WORKER = Path(__file__).parents[1] / "xtail_worker.py"
# Nine or twelve images in batches of four: the last is of one image, for one of the processes.
CHANGES = {"batch_size": 4, "iterations": 7}
# A soft selection, which rounding in another order does not turn.
ARGS = {"moram": {"temperature": 1.0, "threshold": 0.0, "value_scale": 4.0, "protect": 0.9}}


def losses(out):
    return torch.tensor([float(row[2]) for row in steps_of(out)])


# A method that draws noise in training, as MoE-Adapters does, draws another in each process.
@pytest.mark.parametrize("method", ["moram", "ewc", "lada"])
def test_two_processes_give_the_numbers_of_one(tmp_path, method):
    data = write_domains(tmp_path / "data")
    changes = CHANGES | ({"method_args": ARGS[method]} if method in ARGS else {})
    with Choices(TRAINED) as choices:
        expected = run(data, tmp_path / "alone", method, **changes)
    settings = settings_for(data, tmp_path / "two", method, **changes)
    done = launch(WORKER, settings, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (expected["processes"], found["processes"]) == (1, 2)
    alone = losses(tmp_path / "alone")
    torch.testing.assert_close(losses(tmp_path / "two"), alone, rtol=1e-3, atol=1e-4)
    assert len(alone) == 21
    assert expected["matrix"][-1] != expected["untrained"], "training must change answers"
    if assert_same_answers(answers_of(tmp_path / "two"), answers_of(tmp_path / "alone"), choices):
        assert found["matrix"] == expected["matrix"]


def test_one_process_has_whole_rows_and_gradients():
    processes, rows = Processes(together=False), torch.ones(3, 2, requires_grad=True)
    assert processes.whole(rows, 3) is rows and processes.part(rows) is rows
    before = torch.get_rng_state()
    with processes.drawing_alike():
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)
