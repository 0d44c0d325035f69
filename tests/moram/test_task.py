"""`moram.task`: five lines around any loop, with and without protection."""

import re

import pytest
import torch
from task_support import PROTECT, batches_of, learn, llama, seeded, tensors
from tiny_models import (
    fill_values,
    language_model,
)

import moram
from moram import adapters
from moram.task import begin_task


def assert_same(model, other):
    first, second = tensors(model), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_without_protect_it_is_inject_train_grow_train():
    model, plain = llama(), llama()
    for task in range(3):
        learn(model, task, generator=seeded(task))
        atoms = moram.grow(plain, generator=seeded(task)) if task else moram.parameters(plain)
        optimizer = torch.optim.AdamW(atoms, lr=0.02)
        for batch in batches_of(task):
            plain(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for path, adapter in adapters(model).items():
        bank, other = adapter.bank, adapters(plain)[path].bank
        assert bank.num_frozen == 8 and bank.sketch is None and bank.guard is None
        for name, tensor in other.state_dict().items():
            assert torch.equal(bank.state_dict()[name], tensor), name


def test_without_protect_no_batches_are_needed():
    model = llama()
    for _ in range(2):
        with moram.task(model) as atoms:
            assert [id(p) for p in atoms] == [id(p) for p in moram.parameters(model)]
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}


@pytest.mark.parametrize("protect", [None, 0.9])
def test_an_exception_leaves_the_task_open_and_entering_again_goes_on(protect):
    model = llama(**PROTECT | {"protect": protect})
    learn(model, 0)
    with pytest.raises(KeyboardInterrupt), moram.task(model, batches_of(1)) as atoms:
        fill_values(model)
        raise KeyboardInterrupt
    before = tensors(model)
    with moram.task(model, batches_of(1)) as again:
        assert [id(p) for p in again] == [id(p) for p in atoms]
        assert tensors(model).keys() == before.keys()
        for name, tensor in tensors(model).items():
            assert torch.equal(tensor, before[name]), name
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}
    assert all(a.bank.learned and a.bank.guard is None for a in adapters(model).values())


def test_protected_keys_are_blind_to_what_earlier_tasks_filled():
    model = llama(**PROTECT)
    learn(model, 0)
    with moram.task(model, batches_of(1)):
        for adapter in adapters(model).values():
            basis = adapter.bank.sketch.basis(0.9)
            keys = adapter.bank.acting_keys().detach()
            torch.testing.assert_close(
                keys @ basis.T, torch.zeros(4, len(basis)), atol=1e-5, rtol=0
            )
            assert keys.abs().max() > 0


@pytest.mark.parametrize("protect", [None, 0.9])
@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_saved_model_goes_on_like_an_unbroken_one(tmp_path, protect, when):
    settings = PROTECT | {"protect": protect}
    unbroken, broken = llama(**settings), llama(**settings)
    for model in (unbroken, broken):
        learn(model, 0, generator=seeded(1))
        learn(model, 1, generator=seeded(2))
    if when == "inside":
        for model in (unbroken, broken):
            begin_task(model, batches_of(2), generator=seeded(3))
            fill_values(model, 4)
    moram.save(broken, tmp_path)
    broken = language_model()
    moram.load(broken, tmp_path)
    assert_same(broken, unbroken)
    for model in (unbroken, broken):
        learn(model, 2, generator=seeded(3))
    assert_same(broken, unbroken)


def test_sketches_take_half_in_bfloat16_and_nothing_where_they_are_left_out(tmp_path):
    model = llama(**PROTECT)
    learn(model, 0)
    full = moram.save(model, tmp_path)
    half = moram.save(model, tmp_path, sketches="bfloat16")
    # Two blocks, each with one input of q, k and v and one of o: four sketches of 6 x 32, each with
    # its trace, a float32.
    assert (full.sketches, half.sketches) == (4 * (6 * 32 * 4 + 4), 4 * (6 * 32 * 2 + 4))
    fresh = language_model()
    moram.load(fresh, tmp_path)
    learn(fresh, 1)
    none = moram.save(model, tmp_path, sketches=False)
    assert none.sketches == 0 and none.atoms == full.atoms
    assert str(none).endswith("; without their sketches the next task cannot be protected")
    fresh = language_model()
    moram.load(fresh, tmp_path)
    message = (
        "protect must know the inputs of all earlier tasks, got none for "
        "model.layers.0.self_attn.q_proj: they were learned without protect, or saved with "
        "sketches=False; to go on without protection, use moram.task(model, batches, protect=False)"
    )
    before = tensors(fresh)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learn(fresh, 1)
    assert before.keys() == tensors(fresh).keys()
    learn(fresh, 1, protect=False)
    assert {a.bank.num_frozen for a in adapters(fresh).values()} == {4}
    with pytest.raises(ValueError, match="sketches must be float32, bfloat16 or False, got 'no'"):
        moram.save(model, tmp_path, sketches="no")


def test_a_checkpoint_of_trained_atoms_that_does_not_say_so_is_a_finished_task(tmp_path):
    model = llama()
    fill_values(model)
    moram.save(model, tmp_path)
    state = model.state_dict()
    other = llama()
    other.load_state_dict(state)
    with moram.task(other):
        assert {a.bank.num_frozen for a in adapters(other).values()} == {4}
    fresh = llama()
    fresh.load_state_dict(llama().state_dict())
    with moram.task(fresh):
        assert {a.bank.num_frozen for a in adapters(fresh).values()} == {0}
