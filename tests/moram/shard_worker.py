"""What one of two processes does in the tests of sharded and broadcast models. No tests here."""

import torch
import torch.distributed as dist
from tiny_models import Mlp, fill_values, small_config
from torch import nn

import moram
from moram import adapters
from moram.sharded import whole

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
    """A step, a look at the model, a task boundary, another step."""
    step(model)
    with torch.no_grad():
        model(X)
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
    with torch.no_grad():
        other(X)
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


def batches(task):
    """A task's batches; every process takes every other one."""
    generator = torch.Generator().manual_seed(20 + task)
    return [torch.randn(4, 8, generator=generator) * (1 + task) for _ in range(4)]


def protect(model, share=slice(None)):
    """Two tasks of one step over all batches; returns what the banks hold, and an open guard."""
    for task in range(2):
        mine = batches(task)[share]
        with moram.task(model, mine, generator=torch.Generator().manual_seed(5)) as atoms:
            optimizer = torch.optim.SGD(atoms, lr=0.1)
            torch.stack([model(x).square().mean() for x in mine]).mean().backward()
            optimizer.step()
            guards = [adapter.bank.guard for adapter in adapters(model).values()]
            gains = [None if guard is None else guard.gain for guard in guards]
    found = {"gains": gains, "output": model(X).detach()}
    for path, adapter in adapters(model).items():
        rows = adapter.bank.sketch.rows
        found[path] = [rows.T @ rows, adapter.bank.sketch.total, whole(adapter.bank.current_keys)]
    return found


def protected_learner():
    """An `Mlp` whose new keys will be protected."""
    model = Mlp()
    config = small_config(targets=("up", "down"), protect=0.7, protect_size=4, value_scale=8.0)
    moram.inject(model, config, generator=torch.Generator().manual_seed(0))
    return model


def protected_ddp(rank, folder):
    """Learn under protection with DistributedDataParallel around the model."""
    wrapped = nn.parallel.DistributedDataParallel(protected_learner())
    return protect(wrapped, slice(rank, None, 2))


def protected_shards(rank, folder):
    """Learn under protection with base and adapters cut up by `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = protected_learner()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return protect(model, slice(rank, None, 2))


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
    # Who leaves first closes connections that the other may still read.
    dist.barrier()
    dist.destroy_process_group()
