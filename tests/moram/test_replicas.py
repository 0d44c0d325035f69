"""What holds parameters from before the atoms says so or takes them over, and never in silence."""

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from peft import inject_adapter_in_model
from peft_support import config
from tiny_models import Mlp, small_config, trained_mlp
from torch.nn.parallel import DistributedDataParallel

import moram
from moram.trainer import TaskCallback

MESSAGE = (
    "DistributedDataParallel must be made after the atoms that it trains, got a wrapper from "
    "before: it would not add up their gradients, and the processes would drift apart; wrap the "
    "model anew"
)
X = torch.linspace(-1, 1, 32).reshape(4, 8)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    meeting = f"file://{tmp_path_factory.mktemp('group')}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_inject(model, _):
    moram.inject(model, small_config(targets=("up",)))


def by_peft(model, _):
    inject_adapter_in_model(config(target_modules=["up"], task_type=None, protect=None), model)


def by_loading(model, folder):
    moram.save(trained_mlp(), folder)
    moram.load(model, folder)


@pytest.mark.parametrize("enter", [by_inject, by_peft, by_loading])
def test_a_wrapper_from_before_the_adapters_raises_at_its_next_step(enter, tmp_path):
    wrapped = DistributedDataParallel(Mlp())
    enter(wrapped.module, tmp_path)
    with torch.no_grad():
        wrapped(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE)}$"):
            wrapped(X)
    again = DistributedDataParallel(wrapped.module)
    again(X).sum().backward()
    assert all(p.grad is not None for p in moram.parameters(again))


@pytest.mark.parametrize("inside", [False, True])
def test_growing_by_another_number_of_atoms_asks_to_wrap_anew(inside):
    wrapped = DistributedDataParallel(trained_mlp())
    model = wrapped.module if inside else wrapped
    moram.grow(model)
    wrapped(X).sum().backward()
    moram.grow(model, 3)
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE)}$"):
        wrapped(X)
    # As many atoms again are as strange to it.
    moram.grow(model)
    with pytest.raises(RuntimeError, match=f"^{re.escape(MESSAGE)}$"):
        wrapped(X)
    DistributedDataParallel(wrapped.module)(X).sum().backward()


def test_what_grows_is_written_to_the_copy_of_deepspeeds_optimiser():
    model, copies = trained_mlp(), {}
    for index, parameter in enumerate(moram.parameters(model)):
        # What ZeRO-1 and ZeRO-2 put on a parameter.
        parameter._hp_mapping = object()
        parameter.set_full_hp_param = partial(copies.__setitem__, index)
    moram.grow(model)
    for index, parameter in enumerate(moram.parameters(model)):
        assert torch.equal(copies[index], parameter)


def test_a_task_on_shards_of_zero_3_is_refused():
    model = trained_mlp()
    keys = moram.parameters(model)[0]
    keys.ds_id, keys.data = 0, torch.empty(0)
    message = (
        "current_keys must be whole, [N, 8], got a shard (0,); DeepSpeed's ZeRO-3 has cut it up: "
        "use ZeRO-2, or FSDP2"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        TaskCallback().on_train_begin(None, None, None, model=model)


def test_another_number_of_atoms_under_deepspeed_is_refused():
    model = trained_mlp()
    atoms = moram.grow(model, 3)
    for adapter in moram.adapters(model).values():
        adapter.bank.learned = True
    for parameter in atoms:
        parameter._hp_mapping = None
    message = (
        "a task under DeepSpeed must have as many atoms as the one before: its optimiser takes no "
        "new parameters; call moram.grow(model) before the training"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        TaskCallback().on_train_begin(
            None, None, None, model=model, optimizer=torch.optim.SGD(atoms, lr=0.1)
        )
