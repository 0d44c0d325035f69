"""The bank: appending, freezing, growing, capacity, and what its state dict holds."""

import copy
import re

import pytest
import torch

from moram import AtomBank

D, OUT = 5, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def filled_bank(*sizes, **settings):
    """A bank that appended and froze atoms of each size but the last, which is current.

    Also all keys and effective values, drawn here.
    """
    bank = AtomBank(D, OUT, **settings)
    generator, keys, values = seeded(), [], []
    for i, size in enumerate(sizes):
        if i:
            bank.freeze()
        bank.append(size)
        keys.append(torch.randn(size, D, generator=generator))
        values.append(torch.randn(size, OUT, generator=generator))
        with torch.no_grad():
            bank.current_keys.copy_(keys[-1])
            bank.current_values.copy_(values[-1])
    return bank, torch.cat(keys), torch.cat(values) * settings.get("value_scale", 1)


def all_atoms(bank):
    keys, values, current_keys, current_values = bank.segments()
    return torch.cat([keys, current_keys]), torch.cat([values, current_values])


def test_new_bank_is_empty():
    bank = AtomBank(D, OUT, capacity=4)
    assert (bank.num_frozen, bank.num_current, bank.num_atoms, bank.capacity) == (0, 0, 0, 4)
    shapes = [tuple(t.shape) for t in bank.segments()]
    assert shapes == [(0, D), (0, OUT), (0, D), (0, OUT)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), ValueError, "in_features must be >= 1, got 0"),
        ((5, -1), ValueError, "out_features must be >= 1, got -1"),
        ((5.0, 3), TypeError, "in_features must be an integer >= 1, got 5.0"),
        ((5, True), TypeError, "out_features must be an integer >= 1, got True"),
    ],
)
def test_wrong_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        AtomBank(*arguments)


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        (-1, ValueError, "capacity must be >= 0, got -1"),
        (2.5, TypeError, "capacity must be an integer >= 0, got 2.5"),
    ],
)
def test_wrong_capacity_is_named(capacity, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        AtomBank(D, OUT, capacity=capacity)


@pytest.mark.parametrize("method", ["append", "grow"])
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n must be >= 1, got 0"),
        (1.0, TypeError, "n must be an integer >= 1, got 1.0"),
        (True, TypeError, "n must be an integer >= 1, got True"),
    ],
)
def test_wrong_number_of_atoms_is_named_and_changes_nothing(method, n, error, message):
    bank, keys, values = filled_bank(2, 3)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        getattr(bank, method)(n)
    assert (bank.num_frozen, bank.num_current) == (2, 3)
    assert torch.equal(all_atoms(bank)[0], keys) and torch.equal(all_atoms(bank)[1], values)


def test_fresh_keys_are_kaiming_uniform_and_values_zero():
    bank = AtomBank(25, OUT)
    bank.append(4000, seeded())
    keys = bank.current_keys.detach()
    # Kaiming-uniform with a = sqrt(5): bound sqrt(6 / ((1 + 5) * 25)) = 0.2.
    assert keys.abs().max() <= 0.2 and keys.abs().max() > 0.199
    assert keys.mean().abs() < 0.002
    assert abs(keys.std().item() - 0.2 / 3**0.5) < 0.001
    assert (bank.current_values == 0).all()
    assert bank.current_keys.requires_grad and bank.current_values.requires_grad


@pytest.mark.parametrize("start", ["append", "grow_same", "grow_other"])
def test_fresh_keys_come_from_the_generator(start):
    def fresh(seed):
        bank = AtomBank(D, OUT)
        if start != "append":
            bank.append(4 if start == "grow_same" else 2)
        state = torch.get_rng_state()
        (bank.append if start == "append" else bank.grow)(4, seeded(seed))
        assert torch.equal(torch.get_rng_state(), state), "the global stream was used"
        return bank.current_keys.detach()

    expected = torch.empty(4, D).uniform_(-(5**-0.5), 5**-0.5, generator=seeded(7))
    assert torch.equal(fresh(7), expected)
    assert not torch.equal(fresh(8), expected)


def test_appending_keeps_the_current_atoms():
    bank, keys, values = filled_bank(3)
    bank.append(2)
    assert bank.num_current == 5
    assert torch.equal(bank.current_keys[:3], keys) and torch.equal(bank.current_values[:3], values)
    assert (bank.current_values[3:] == 0).all()


@pytest.mark.parametrize("value_scale", [1.0, 2.5])
def test_freezing_moves_the_effective_atoms(value_scale):
    bank, keys, values = filled_bank(2, 3, value_scale=value_scale)
    torch.testing.assert_close(all_atoms(bank)[1], values, rtol=0, atol=0)
    bank.freeze()
    assert (bank.num_frozen, bank.num_current) == (5, 0)
    assert torch.equal(bank.segments()[0], keys)
    assert torch.equal(bank.segments()[1], values)
    bank.freeze()
    assert bank.num_frozen == 5


@pytest.mark.parametrize("n", [3, 4], ids=["as_many", "more"])
def test_growing_freezes_and_appends_atoms_with_zero_values(n):
    bank, keys, values = filled_bank(2, 3, value_scale=3.0)
    bank.grow(n, seeded(1))
    assert (bank.num_frozen, bank.num_current) == (5, n)
    assert torch.equal(bank.segments()[0], keys) and torch.equal(bank.segments()[1], values)
    assert (bank.current_values == 0).all()


def test_growing_by_the_same_number_keeps_the_parameters():
    bank, keys, _ = filled_bank(3)
    parameters = [bank.current_keys, bank.current_values]
    all_atoms(bank)[0].sum().backward()
    for _ in range(5):
        bank.grow(3)
        assert bank.current_keys is parameters[0] and bank.current_values is parameters[1]
        assert bank.current_keys.grad is None and bank.current_values.grad is None
    assert bank.num_frozen == 15
    assert torch.equal(bank.frozen_keys[:3], keys)
    bank.grow(2)
    assert bank.current_keys is not parameters[0]


def test_frozen_atoms_share_no_memory_with_the_current_ones():
    bank, keys, values = filled_bank(3)
    bank.grow(3)
    with torch.no_grad():
        bank.current_keys.fill_(9)
        bank.current_values.fill_(9)
    assert torch.equal(bank.segments()[0], keys) and torch.equal(bank.segments()[1], values)


@pytest.mark.parametrize("n", [3, 2], ids=["as_many", "fewer"])
@pytest.mark.parametrize("method", ["grow", "append"])
def test_new_atoms_train_even_where_the_current_ones_were_frozen(method, n):
    bank, _, _ = filled_bank(3)
    bank.requires_grad_(False)
    getattr(bank, method)(n)
    assert bank.current_keys.requires_grad and bank.current_values.requires_grad


def test_capacity_doubles_when_full_and_not_before():
    bank = AtomBank(D, OUT, capacity=4)
    bank.append(2)
    seen = []
    for _ in range(9):
        buffer, capacity = bank.frozen_keys, bank.capacity
        bank.grow(2)
        seen.append(bank.capacity)
        assert (bank.frozen_keys is buffer) == (bank.capacity == capacity)
    assert seen == [4, 4, 8, 8, 16, 16, 16, 16, 32]
    assert bank.frozen_values.shape == (32, OUT)


def test_capacity_grows_at_once_to_a_task_larger_than_double():
    bank, keys, _ = filled_bank(2, 7, capacity=2)
    bank.freeze()
    assert bank.capacity == 9
    assert torch.equal(bank.segments()[0], keys)


def test_reserve_makes_room_and_never_shrinks():
    bank, keys, values = filled_bank(3, 1)
    bank.reserve(10)
    assert (bank.capacity, bank.num_frozen) == (10, 3)
    bank.reserve(2)
    assert bank.capacity == 10
    assert torch.equal(all_atoms(bank)[0], keys) and torch.equal(all_atoms(bank)[1], values)


def test_state_dict_holds_live_rows_alone():
    bank, keys, values = filled_bank(2, 3, capacity=50, value_scale=2.0)
    state = bank.state_dict()
    parts = {"frozen_keys", "frozen_values", "current_keys", "current_values"}
    assert set(state) == parts | {"live"}
    assert torch.equal(state["frozen_keys"], keys[:2])
    assert torch.equal(state["frozen_values"], values[:2])
    # Current values are stored as they are trained, before the scale of 2.
    assert torch.equal(state["current_values"] * 2, values[2:])


@pytest.mark.parametrize("sizes", [(), (1,), (4, 4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("capacity", [0, 3, 40])
def test_state_dict_loads_into_a_bank_of_any_size(sizes, capacity):
    bank, keys, values = filled_bank(2, 3, value_scale=2.0)
    other = AtomBank(D, OUT, capacity=capacity, value_scale=2.0)
    if sizes:
        other, _, _ = filled_bank(*sizes, capacity=capacity, value_scale=2.0)
    other.load_state_dict(bank.state_dict(), strict=True)
    assert (other.num_frozen, other.num_current) == (2, 3)
    assert torch.equal(all_atoms(other)[0], keys) and torch.equal(all_atoms(other)[1], values)
    other.grow(3)
    assert torch.equal(other.segments()[0], keys) and torch.equal(other.segments()[1], values)


def test_loading_copies_the_tensors():
    bank, keys, _ = filled_bank(2, 3)
    other, _, _ = filled_bank(2, 3)
    other.load_state_dict(bank.state_dict())
    with torch.no_grad():
        bank.current_keys.zero_()
        bank.frozen_keys.zero_()
    assert torch.equal(all_atoms(other)[0], keys)


WRONG_STATES = [
    ("frozen_keys", (2, D + 1), "frozen_keys must be [N, 5], got (2, 6)"),
    ("frozen_values", (2, D), "frozen_values must be [N, 3], got (2, 5)"),
    ("current_keys", (D,), "current_keys must be [N, 5], got (5,)"),
    ("current_values", (3, OUT, 1), "current_values must be [N, 3], got (3, 3, 1)"),
    (
        "frozen_values",
        (4, OUT),
        "frozen_keys and frozen_values must have as many rows, got 2 and 4",
    ),
    (
        "current_keys",
        (1, D),
        "current_keys and current_values must have as many rows, got 1 and 3",
    ),
]


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_STATES)
def test_wrong_shape_in_a_state_dict_is_named(name, shape, message):
    bank, keys, values = filled_bank(2, 3)
    state = {**bank.state_dict(), name: torch.ones(shape)}
    model = torch.nn.ModuleDict({"inner": bank})
    with pytest.raises(RuntimeError, match=re.escape(f"inner: {message}")):
        model.load_state_dict({f"inner.{key}": value for key, value in state.items()})
    assert torch.equal(all_atoms(bank)[0], keys) and torch.equal(all_atoms(bank)[1], values)


def test_missing_tensor_in_a_state_dict_is_named():
    bank, keys, _ = filled_bank(2, 3)
    state = filled_bank(4, 1)[0].state_dict()
    del state["frozen_values"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"frozen_values"'):
        bank.load_state_dict(state)
    assert torch.equal(all_atoms(bank)[0], keys)


def test_deepcopy_is_independent():
    bank, keys, values = filled_bank(2, 3)
    twin = copy.deepcopy(bank)
    twin.grow(3)
    with torch.no_grad():
        twin.frozen_keys.fill_(7)
        twin.current_keys.fill_(7)
    assert (bank.num_frozen, bank.num_current) == (2, 3)
    assert (twin.num_frozen, twin.num_current) == (5, 3)
    assert torch.equal(all_atoms(bank)[0], keys) and torch.equal(all_atoms(bank)[1], values)


def test_bank_changes_dtype_with_to():
    bank, _, values = filled_bank(2, 3, value_scale=2.0)
    bank.to(torch.bfloat16)
    assert {t.dtype for t in bank.segments()} == {torch.bfloat16}
    bank.freeze()
    assert torch.equal(bank.segments()[1], values.to(torch.bfloat16))


def test_bank_prints_its_sizes():
    bank, _, _ = filled_bank(2, 3, capacity=6)
    assert repr(bank) == "AtomBank(5 -> 3, frozen=2, current=3, capacity=6)"


def test_loading_its_own_state_dict_changes_nothing():
    bank = AtomBank(3, 2, capacity=8)
    for seed in range(3):
        bank.grow(2, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            bank.current_values.normal_()
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.load_state_dict(bank.state_dict())
    assert before["frozen_values"].abs().sum() > 0
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, before[name])
