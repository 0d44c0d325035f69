"""The count of frozen atoms: when it is read, from where, and what it must be."""

import re

import pytest
import torch
from tiny_models import small_bank, small_config

import moram
from moram import AtomBank
from moram.live import UNIT
from moram_kernels import ops


def test_a_count_that_fits_no_row_is_refused():
    bank = small_bank(4, 2)
    bank.live.fill_(9 * UNIT)
    message = (
        "live must count the live rows of frozen_keys, 0 to 4, got 9: load a state dict, or move "
        "live together with the other tensors"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        bank.segments()


@pytest.fixture
def reads():
    """The counts that were read as if from an accelerator: every read of a tensor is noted."""
    seen = []

    class Elsewhere(torch.Tensor):
        """A count that claims to lie on an accelerator."""

        @property
        def is_cpu(self):
            return False

        def __int__(self):
            seen.append(super().__int__())
            return seen[-1]

    return Elsewhere, seen


def test_an_accelerator_is_asked_for_the_count_only_after_a_change(reads):
    elsewhere, seen = reads
    bank = small_bank(4, 2)
    bank.live = bank.live.as_subclass(elsewhere)
    for _ in range(3):
        assert bank.num_frozen == 4
    assert seen == [4 * UNIT]
    bank.live.sub_(UNIT)
    assert [bank.num_frozen, bank.num_frozen] == [3, 3] and seen == [4 * UNIT, 3 * UNIT]
    bank.live = torch.tensor(2 * UNIT).as_subclass(elsewhere)
    assert [bank.num_frozen, bank.num_frozen] == [2, 2] and seen == [4 * UNIT, 3 * UNIT, 2 * UNIT]
    bank.grow(2)
    assert bank.num_frozen == 4 and seen == [4 * UNIT, 3 * UNIT, 2 * UNIT]


def test_a_moved_count_is_told_from_one_that_had_its_address():
    noted = torch.full((3,), -1)
    count = torch.ops.moram.live_count
    live = torch.tensor(0)
    assert int(count(live, noted, UNIT)) == 0
    # As if freed, and its memory taken by another count that nobody has written to yet.
    live.data.fill_(4 * UNIT)
    other = torch.from_numpy(live.numpy())
    assert other.data_ptr() == live.data_ptr() and other._version == 0
    assert int(count(other, noted, UNIT)) == 4
    bank = small_bank(4, 2)
    bank.noted.fill_(7)
    bank.to(torch.float64)
    assert bank.noted.tolist() == [-1, -1, -1] and bank.live._version > 0
    bank.noted.fill_(7)
    bank.eval()
    assert bank.noted.tolist() == [-1, -1, -1]


def test_a_compiled_call_refuses_a_count_of_more_rows_than_there_are():
    layer = moram.MoRAMLinear(6, 5, config=small_config())
    layer.bank.live.fill_(1000 * UNIT)
    call = torch.compile(layer, backend="eager", fullgraph=True)
    message = "num_frozen must be in [0, 32], the rows of keys, got 1000"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(torch.randn(3, 6))


def test_compiled_calls_note_the_count_until_it_changes(monkeypatch):
    monkeypatch.setattr(
        AtomBank, "live_count", lambda b: torch.ops.moram.live_count(b.live, b.noted, UNIT)
    )
    read = []
    monkeypatch.setattr(ops, "int", lambda t: read.append(1) or t.item(), raising=False)
    layer = moram.MoRAMLinear(6, 5, config=small_config(capacity=40))
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6)
    for task in range(3):
        if task:
            layer.bank.grow(4)
        with torch.no_grad():
            layer.bank.current_values.normal_()
            torch.testing.assert_close(call(x), layer(x))
            read.clear()
            call(x)
        # The operator reads its CPU copy; the count itself is not read again.
        assert len(read) == 1
