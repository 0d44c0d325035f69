"""What one of two processes does in the tests of sharded and broadcast models. No tests here."""

import torch
import torch.distributed as dist
from tiny_models import Mlp, fill_values, small_config
from torch import nn

import moram
from moram import adapters

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def learner(tasks=2, seed=0):
    """An `Mlp` with adapters after some tasks, equal in every process."""
    model = Mlp()
    generator = torch.Generator().manual_seed(seed)
    moram.inject(model, small_config(targets=("up", "down")), generator=generator)
    for task in range(tasks):
        if task:
            moram.grow(model, generator=generator)
        fill_values(model, seed + task)
    return model


def step(model):
    """One step of learning."""
    optimizer = torch.optim.SGD(moram.parameters(model), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()


def next_task(model):
    """A step, a task boundary, another step."""
    step(model)
    moram.grow(model, generator=torch.Generator().manual_seed(5))
    step(model)


def said(act):
    """The message of what act() raises."""
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return None


def shard(rank, folder):
    """Learn, save and load with adapters that `fully_shard` has cut up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = learner()
    fully_shard(model, mesh=mesh)
    next_task(model)
    moram.save(model, f"{folder}/sharded")
    other = learner(seed=3)
    fully_shard(other, mesh=mesh)
    dist.barrier()
    moram.load(other, f"{folder}/sharded")
    grown = said(lambda: moram.grow(other, 3))
    kept = learner()
    fully_shard(kept, mesh=mesh, ignored_params=set(moram.parameters(kept)))
    for size in (3, 4):
        moram.grow(kept, size)
        step(kept)
    moram.save(kept, f"{folder}/kept")
    return {
        "output": model(X).detach(),
        "loaded": other(X).detach(),
        "grown": grown,
        "kept": kept(X).detach(),
    }


def flat(rank, folder):
    """Grow and save what FullyShardedDataParallel has cut up, inside and outside of its view."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = learner()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    def learn():
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        wrapped(X).square().mean().backward()
        optimizer.step()

    learn()
    messages = {
        "grow": said(lambda: moram.grow(model)),
        "save": said(lambda: moram.save(wrapped, f"{folder}/shard")),
    }
    with FullyShardedDataParallel.summon_full_params(wrapped):
        messages["replace"] = said(lambda: moram.grow(model, 3))
        moram.grow(model, generator=torch.Generator().manual_seed(5))
    learn()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        if rank == 0:
            moram.save(wrapped, f"{folder}/whole")
    return messages


def broadcast(rank, folder):
    """Load in the first process alone, then wrap: what does every process answer?"""
    model = learner(tasks=1)
    if rank == 0:
        moram.load(model, folder)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad():
        output = wrapped(X)
    return {"output": output, "frozen": [a.bank.num_frozen for a in adapters(model).values()]}


def run(rank, name, folder):
    """Run one of the functions above in a process group of two and write down what it returns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(globals()[name](rank, folder), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
