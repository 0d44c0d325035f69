"""Trainers over two processes learn what one process does, and one loads what they saved."""

import pytest
import torch
import trainer_worker
from peft_support import banks, by_moram, by_peft, save_base

WAYS = ("ddp", "shards", "stopped shards")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A folder with runs of two processes in every way, and of one in "one"."""
    folder = tmp_path_factory.mktemp("runs")
    torch.multiprocessing.spawn(trainer_worker.run, args=(str(folder), str(base)), nprocs=2)
    torch.save(trainer_worker.learn(folder / "one", base, world=1), folder / "one.pt")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_tasks_with_a_trainer_as_one_does(runs, way):
    expected = torch.load(runs / "one.pt")["matrix"]
    for rank in range(2):
        found = torch.load(runs / f"rank{rank}.pt")[way]
        assert found["is_sharded"] == ("shards" in way)
        for row, wanted in zip(found["matrix"], expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_process_loads_by_peft_what_two_have_saved(runs, base, way):
    found = banks(by_peft(base, runs / way / "adapters"))
    expected = banks(by_moram(base, runs / "one" / "adapters"))
    for bank, wanted in zip(found, expected, strict=True):
        # A sketch's rows are known up to a rotation.
        for each in (bank, wanted):
            each["rows"] = each["rows"].T @ each["rows"]
        torch.testing.assert_close(bank, wanted, rtol=1e-3, atol=1e-5)
        assert len(bank["frozen_keys"]) == 4
