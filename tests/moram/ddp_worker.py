"""What one process of the DistributedDataParallel test does. No tests and no model library here."""

import torch
import torch.distributed as dist
from torch import nn

import moram
from moram import MoRAMConfig, adapters

ROWS = 8


def build():
    """The model, equal in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    config = MoRAMConfig(atoms_per_task=3, top_k=2, temperature=0.3, targets=("0", "2"))
    moram.inject(model, config, generator=torch.Generator().manual_seed(1))
    return model


def batch(task):
    """The joint batch of a task."""
    generator = torch.Generator().manual_seed(10 + task)
    return torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 4, generator=generator)


def learn(model, wrap, rows):
    """Two steps in each of two tasks; returns all gradients and the frozen atoms at the end."""
    seen = []
    for task in range(2):
        if task:
            moram.grow(model, generator=torch.Generator().manual_seed(2))
        wrapped = wrap(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        x, y = batch(task)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.mse_loss(wrapped(x[rows]), y[rows]).backward()
            seen += [p.grad.clone() for p in parameters]
            optimizer.step()
    for adapter in adapters(model).values():
        seen += [t.clone() for t in adapter.bank.segments()[:2]]
    return seen


def run(rank, world, folder):
    """Learn on every world-th row of the batch and write down what was seen."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    wrap = nn.parallel.DistributedDataParallel
    torch.save(learn(build(), wrap, slice(rank, None, world)), f"{folder}/rank{rank}.pt")
    # Who leaves first closes connections that the other may still read.
    dist.barrier()
    dist.destroy_process_group()
