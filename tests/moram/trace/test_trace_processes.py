"""Two processes, with a whole and with a sharded base, give the numbers of one."""

import csv
import json
from pathlib import Path

import pytest
import torch
from choices import TRAINED, Choices, answers_of, assert_same_answers
from trace_support import settings_for, write_data, write_model
from two_processes import launch

from moram.processes import Processes
from moram.trace.run import run_trace

WORKER = Path(__file__).parents[1] / "trace_worker.py"
# A soft selection: rounding in another order must not change which atoms fire.
CHANGES = {
    "method_args": {"protect": 0.9, "protect_size": 8, "value_scale": 8.0, "temperature": 0.3},
    "decoding": {"letters": "generate", "*": "forced"},
    "full_matrix": True,
    "epochs": 3,
    # Three examples for two processes, one at a time: a pass more in one than in the other.
    "batch_size": 3,
    "micro_batch": 1,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings of a run, by its folder, what one process gave and chose, and the root of both."""
    folder = tmp_path_factory.mktemp("processes")
    model, data = write_model(folder / "model"), write_data(folder / "data", examples=18)

    def make(out, **changes):
        return settings_for(model, data, folder / out, **CHANGES | changes)

    with Choices(TRAINED) as choices:
        run_trace(make("alone"))
    return make, read(folder / "alone"), choices, folder


def read(out):
    """R, the answers, and the losses of a run."""
    results = json.loads((out / "results.json").read_text())
    with open(out / "steps.csv", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return results, answers_of(out), torch.tensor(losses)


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_processes_give_the_numbers_of_one(alone, shard):
    make, (expected, answers, losses), choices, folder = alone
    # 18 answers in batches of 4 do not share out evenly, which must not matter.
    out = f"shard{shard}"
    done = launch(WORKER, make(out, shard=shard), folder)
    assert done.returncode == 0, done.stderr[-2000:]
    # 2 layers of 9 tensors, the embedding, the head and the last norm.
    assert ("sharded 21 of 21" in done.stdout) == shard, done.stdout
    results, found, steps = read(folder / out)
    assert results["processes"] == 2 and expected["processes"] == 1
    if assert_same_answers(found, answers, choices):
        assert results["matrix"] == expected["matrix"]
    assert max(max(row) for row in results["matrix"]) > 50, "something must have been learned"
    torch.testing.assert_close(steps, losses, rtol=1e-3, atol=1e-4)


def test_a_sharded_base_refuses_a_cached_prefix(alone):
    make, *_ = alone
    changes = {"cache_prefix": True, "first_layer": 1, "decoding": "forced", "shard": True}
    with pytest.raises(ValueError, match="cache_prefix and a sharded model do not go together"):
        run_trace(make("refused", **changes))


def test_one_process_shares_and_sums_with_nobody():
    processes = Processes()
    assert processes.is_first and processes.world == 1
    assert processes.share([1, 2, 3]) == processes.gather([1, 2, 3]) == [1, 2, 3]
    tensors = [torch.ones(2), torch.ones(3)]
    processes.sum(tensors)
    assert all(t.eq(1).all() for t in tensors)
    assert processes.broadcast("x") == "x"
