"""An optimiser that a new task made useless says so; any other is left in peace."""

import gc
import re
import warnings

import pytest
import torch
from tiny_models import Mlp, small_config, trained_mlp

import moram
from moram import adapters

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
USELESS = (
    "optimizer must hold the atoms that moram.grow returned, got one that was built before, and "
    "none holds them: its step would not train them; build a new optimizer"
)
MOMENTS = (
    "optimizer must be fresh for fresh atoms, got one whose moments of an earlier task's atoms "
    "move those that moram.grow made; build a new optimizer"
)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def learn(model, optimizer, steps=1):
    """Take some steps; returns whether they moved what the optimiser holds."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return any(not torch.equal(p, old) for p, old in zip(held, before, strict=True))


@pytest.fixture(autouse=True)
def strict():
    """No warning without reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_stale_optimiser_raises_at_its_first_step(kind):
    model = trained_mlp()
    optimizer = OPTIMIZERS[kind](moram.parameters(model))
    learn(model, optimizer)
    moram.grow(model, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{re.escape(USELESS)}$"):
            learn(model, optimizer)
    fresh = OPTIMIZERS[kind](moram.parameters(model))
    learn(model, fresh, 2)


@pytest.mark.parametrize("kind", ["AdamW", "momentum"])
def test_old_moments_for_new_atoms_warn_once(kind):
    model = trained_mlp()
    optimizer = OPTIMIZERS[kind](moram.parameters(model))
    learn(model, optimizer)
    moram.grow(model)
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(MOMENTS)}$"):
        learn(model, optimizer)
    learn(model, optimizer, 2)


def test_moments_of_a_second_boundary_warn_again():
    model = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(model))
    learn(model, optimizer)
    for _ in range(2):
        moram.grow(model)
        with pytest.warns(RuntimeWarning, match="fresh for fresh atoms"):
            learn(model, optimizer)


def test_fresh_optimisers_and_those_without_moments_are_left_in_peace():
    model = trained_mlp()
    for n in (None, 3, 3, None):
        learn(model, OPTIMIZERS["AdamW"](moram.parameters(model)), 2)
        moram.grow(model, n)
    plain = OPTIMIZERS["SGD"](moram.parameters(model))
    learn(model, plain)
    moram.grow(model)
    assert learn(model, plain)


def test_an_optimiser_whose_state_was_cleared_or_loaded_is_left_in_peace():
    model = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(model))
    learn(model, optimizer)
    moram.grow(model)
    learn(model, twin := OPTIMIZERS["AdamW"](moram.parameters(model)))
    optimizer.load_state_dict(twin.state_dict())
    learn(model, optimizer)
    moram.grow(model)
    optimizer.state.clear()
    assert learn(model, optimizer)


def test_an_optimiser_that_was_given_the_new_atoms_is_left_in_peace():
    model = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(model))
    learn(model, optimizer)
    optimizer.add_param_group({"params": moram.grow(model, 3)})
    assert learn(model, optimizer, 2)


def test_an_optimiser_of_a_head_goes_on_beside_the_new_one():
    model, head = trained_mlp(), torch.nn.Linear(8, 8)
    optimizer = OPTIMIZERS["AdamW"]([*moram.parameters(model), *head.parameters()])
    both = torch.nn.Sequential(model, head)
    learn(both, optimizer)
    fresh = OPTIMIZERS["AdamW"](moram.grow(model, 3))
    for _ in range(2):
        fresh.zero_grad()
        assert learn(both, optimizer)
        fresh.step()


def test_an_optimiser_is_judged_once_where_another_has_taken_over(monkeypatch):
    model, head, scans = trained_mlp(), torch.nn.Linear(8, 8), []
    optimizer = OPTIMIZERS["AdamW"]([*moram.parameters(model), *head.parameters()])
    both = torch.nn.Sequential(model, head)
    learn(both, optimizer)
    fresh = OPTIMIZERS["AdamW"](moram.grow(model, 3))
    look = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: scans.append(1) or look())
    for _ in range(4):
        fresh.zero_grad()
        learn(both, optimizer)
        fresh.step()
    assert len(scans) == 1


def test_one_of_two_stale_optimisers_raises_when_only_the_other_was_rebuilt():
    model = trained_mlp()

    def keys_and_values():
        found = moram.parameters(model)
        return torch.optim.AdamW(found[::2], lr=0.1), torch.optim.AdamW(found[1::2], lr=0.1)

    keys, values = keys_and_values()
    moram.grow(model, 2)
    keys, _ = torch.optim.AdamW(moram.parameters(model)[::2], lr=0.1), keys
    model(X).square().sum().backward()
    keys.step()
    with pytest.raises(RuntimeError, match="none holds them"):
        values.step()


def test_loading_atoms_of_another_number_makes_an_optimiser_stale(tmp_path):
    model = trained_mlp()
    moram.grow(model, 2)
    moram.save(model, tmp_path)
    other = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(other))
    learn(other, optimizer)
    moram.load(other, tmp_path)
    with pytest.raises(RuntimeError, match="none holds them"):
        learn(other, optimizer)
    same = trained_mlp(seed=5)
    moram.save(same, tmp_path)
    other = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(other))
    learn(other, optimizer)
    moram.load(other, tmp_path)
    # The atoms were overwritten and not begun anew: going on is for the user to judge.
    learn(other, optimizer)


def test_an_optimiser_of_another_model_is_left_in_peace():
    model, other = trained_mlp(), trained_mlp(seed=3)
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(other))
    learn(other, optimizer)
    moram.grow(model, 3)
    model(X).sum().backward()
    assert learn(other, optimizer)


def test_a_watched_optimiser_is_freed_with_its_last_reference():
    model = trained_mlp()
    optimizer = OPTIMIZERS["AdamW"](moram.parameters(model))
    learn(model, optimizer)
    moram.grow(model, 3)
    del optimizer
    gc.collect()
    assert not [o for o in gc.get_objects() if issubclass(type(o), torch.optim.AdamW)]


def test_grow_returns_the_parameters_to_train():
    model = Mlp()
    moram.inject(model, small_config(targets=("up", "down")))
    model.requires_grad_(False)
    found = moram.grow(model)
    banks = [a.bank for a in adapters(model).values()]
    expected = [p for b in banks for p in (b.current_keys, b.current_values)]
    assert [id(p) for p in found] == [id(p) for p in expected] == list(map(id, found))
    assert all(p.requires_grad for p in found)
    learn(model, OPTIMIZERS["SGD"](found))
