"""A bank whose tensors something else copies, cuts up or writes to keeps all of its atoms."""

import copy
import io
import pickle
import re

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tiny_models import fill_values, language_model, small_bank, small_config, token_ids
from torch import nn

import moram
from moram import adapters
from moram.live import UNIT

PARTS = ("frozen_keys", "frozen_values", "current_keys", "current_values")
IDS = token_ids()


def learner(tasks, seed=0, **settings):
    """A Llama after some tasks; equal bases, whatever the seed."""
    model = language_model()
    generator = torch.Generator().manual_seed(seed)
    moram.inject(model, small_config(**settings), generator=generator)
    for task in range(tasks):
        if task:
            moram.grow(model, generator=generator)
        fill_values(model, seed + task)
    return model


@torch.no_grad()
def answers(model):
    return model(IDS).logits


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_the_state_dict_owns_its_tensors_and_holds_live_rows_alone():
    model = learner(2)
    state = model.state_dict()
    own = {t.data_ptr() for t in model.buffers() if t.numel()}
    for name, tensor in state.items():
        if "frozen_" in name:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, name
            assert tensor.shape[0] == 4 and tensor.data_ptr() not in own, name


@pytest.mark.parametrize("way", ["torch", "pickle", "deepcopy", "safetensors"])
def test_a_written_state_dict_has_no_spare_rows_and_gives_the_same_answers(way):
    model = learner(3, capacity=4000)
    state = model.state_dict()
    exact = sum(t.numel() * t.itemsize for t in state.values())
    if way == "torch":
        file = io.BytesIO()
        torch.save(state, file)
        size = file.tell()
        file.seek(0)
        state = torch.load(file)
    elif way == "pickle":
        written = pickle.dumps(state)
        size, state = len(written), pickle.loads(written)
    elif way == "safetensors":
        # The model's own tied weights, which safetensors refuses, are none of ours.
        state = {n: t for n, t in state.items() if n != "lm_head.weight"}
        written = save_safetensors(state)
        size, state = len(written), load_safetensors(written)
    else:
        state = copy.deepcopy(state)
        size = sum(t.untyped_storage().nbytes() for t in state.values())
    assert size < 1.5 * exact
    fresh = learner(1, seed=5)
    fresh.load_state_dict(state, strict=way != "safetensors")
    assert torch.equal(answers(fresh), answers(model))


def test_accelerate_saves_and_loads_a_state(tmp_path):
    from accelerate import Accelerator

    model = learner(2)
    expected = answers(model)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_state_of_current_atoms_alone_is_loaded(tasks):
    model, other = learner(3), learner(tasks, seed=5)
    state = {n: p for n, p in model.state_dict().items() if ".bank.current_" in n}
    found = other.load_state_dict(state, strict=False)
    for path, adapter in adapters(other).items():
        source = adapters(model)[path].bank
        assert torch.equal(adapter.bank.current_keys, source.current_keys)
        assert torch.equal(adapter.bank.current_values, source.current_values)
        assert adapter.bank.num_frozen == 4 * (tasks - 1)
        assert {f"{path}.bank.frozen_keys", f"{path}.bank.frozen_values"} <= set(found.missing_keys)


@pytest.mark.parametrize("name", PARTS)
def test_each_tensor_of_a_bank_loads_alone_where_it_fits(name):
    bank, other = small_bank(4, 2), small_bank(4, 2, seed=1)
    before = other.state_dict()
    found = other.load_state_dict({name: bank.state_dict()[name]}, strict=False)
    assert set(found.missing_keys) == set(PARTS) - {name}
    for part in PARTS:
        expected = bank.state_dict() if part == name else before
        assert torch.equal(other.state_dict()[part], expected[part]), part
    assert (other.num_frozen, other.num_current) == (4, 2)


UNFIT = {
    "half of a pair of another size": (
        {"current_keys": torch.ones(3, 5)},
        "current_keys must have 2 rows as here, because current_values is absent, got 3",
    ),
    "half of a frozen pair": (
        {"frozen_values": torch.ones(7, 3)},
        "frozen_values must have 4 rows as here, because frozen_keys is absent, got 7",
    ),
    "a count without its atoms": (
        {"live": torch.tensor(8 * UNIT)},
        "live must count the frozen atoms that come along, 4, got 8",
    ),
    "a count of more atoms than come": (
        {
            "frozen_keys": torch.ones(2, 5),
            "frozen_values": torch.ones(2, 3),
            "live": torch.tensor(3 * UNIT),
        },
        "live must count the frozen atoms that come along, 2, got 3",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    state, message = UNFIT[case]
    bank = small_bank(4, 2)
    before = bank.state_dict()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bank.load_state_dict(state, strict=False)
    for name, tensor in before.items():
        assert torch.equal(bank.state_dict()[name], tensor), name


def test_a_state_dict_without_a_count_loads_as_many_atoms_as_it_has_rows():
    bank, other = small_bank(4, 2), small_bank(1, 2, seed=1)
    state = {name: tensor for name, tensor in bank.state_dict().items() if name != "live"}
    other.load_state_dict(state)
    assert (other.num_frozen, other.num_current) == (4, 2)


@pytest.mark.parametrize("source", ["tensors", "state_dict"])
def test_functional_call_answers_with_the_atoms_it_is_given(source):
    model, other = learner(3), learner(1, seed=5)
    given = tensors_of(model) if source == "tensors" else model.state_dict()
    own = answers(other)
    with torch.no_grad():
        output = torch.func.functional_call(other, given, (IDS,)).logits
    assert torch.equal(output, answers(model))
    assert torch.equal(answers(other), own)


def test_tensors_written_in_place_bring_their_count_along():
    model, other = learner(3), learner(1, seed=5)
    given = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors_of(other).items():
            tensor.copy_(given[name])
    assert torch.equal(answers(other), answers(model))


def test_an_averaged_model_takes_over_the_frozen_atoms():
    model = learner(1)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    moram.grow(model)
    moram.grow(model)
    fill_values(model, 3)
    averaged.update_parameters(model)
    assert torch.equal(answers(averaged), answers(model))
    # The mean of equal models is the model, to rounding; the count is exact.
    averaged.update_parameters(model)
    torch.testing.assert_close(answers(averaged), answers(model))
    assert {a.bank.num_frozen for a in adapters(averaged.module).values()} == {8}


@pytest.mark.parametrize("decay", [0.9, 0.9995])
@pytest.mark.parametrize("tasks", [4, 25])
def test_an_exponential_average_keeps_every_atom(tasks, decay):
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    model = learner(tasks)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(model)
    assert {a.bank.num_frozen for a in adapters(averaged).values()} == {4 * (tasks - 1)}
    torch.testing.assert_close(answers(averaged), answers(model))


def test_an_average_of_banks_of_different_sizes_is_refused():
    model = learner(1, capacity=40)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    moram.grow(model, 4)
    averaged.update_parameters(model)
    message = (
        "live must be one number of frozen atoms, got 1.33: banks of different sizes cannot be "
        "averaged or stacked"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        answers(averaged)


def test_a_state_dict_takes_a_model_back_behind_a_growth():
    model = learner(2)
    state, before = copy.deepcopy(model.state_dict()), answers(model)
    moram.grow(model)
    fill_values(model, 7)
    model.load_state_dict(state)
    assert torch.equal(answers(model), before)


def test_spare_rows_without_a_count_are_no_atoms():
    model, other = learner(2), learner(1, seed=5)
    floats = {n: t for n, t in tensors_of(model).items() if t.is_floating_point()}
    assert not any(name.endswith(".live") for name in floats)
    other.load_state_dict(floats, strict=False)
    assert torch.equal(answers(other), answers(model))


def test_an_ensemble_of_banks_of_one_size_is_vmapped():
    layers = [moram.MoRAMLinear(6, 5, config=small_config()) for _ in range(3)]
    for layer in layers:
        layer.bank.grow(4)
        fill_values(layer)
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(4, 6)

    def call(parameters, buffers):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    outputs = torch.func.vmap(call)(parameters, buffers)
    for layer, output in zip(layers, outputs, strict=True):
        torch.testing.assert_close(output, layer(x))


def _grow_shared(model):
    torch.set_num_threads(1)
    moram.grow(model, generator=torch.Generator().manual_seed(9))


def test_atoms_that_another_process_froze_in_shared_memory_are_seen():
    model = nn.Sequential(nn.Linear(6, 5))
    moram.inject(model, small_config(targets=("0",)))
    fill_values(model)
    twin = copy.deepcopy(model)
    _grow_shared(twin)
    model.share_memory()
    x = torch.randn(4, 6)
    spawn = torch.multiprocessing.get_context("spawn")
    process = spawn.Process(target=_grow_shared, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0
    (adapter,) = adapters(model).values()
    assert adapter.bank.num_frozen == 4
    assert torch.equal(model(x), twin(x))
