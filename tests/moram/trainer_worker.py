"""What one of two processes does in the tests of Trainers over several. No tests here."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft_support import peft_model
from trainer_support import TWO, Stop, make_trainer, score

from moram.sharded import is_sharded
from moram.trainer import train_tasks

# Of a Trainer's steps and of protection's passes, two processes take the same examples as one.
SIZES = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
SHARDED = {"fsdp": True, "accelerator_config": {"use_configured_state": True}}


def learn(folder, base, stop=None, world=2, seed=0, **changes):
    """Two tasks in a run; the scores, and whether the model was cut up. `stop`: ends the second
    task after that step, and another model goes on."""
    sizes = {name: size * 2 // world for name, size in SIZES.items()}
    make = partial(make_trainer, **(sizes | changes))
    model = peft_model(base, seed=seed)

    def make_failing(model, data, folder):
        trainer = make(model, data, folder)
        if data is TWO["second"]:
            trainer.add_callback(Stop(stop))
        return trainer

    if stop:
        try:
            train_tasks(model, TWO, make_failing, score, folder)
        except KeyboardInterrupt:
            return learn(folder, base, None, world, seed + 1, **changes)
    matrix = train_tasks(model, TWO, make, score, folder).matrix
    return {"matrix": matrix, "is_sharded": is_sharded(model)}


def run(rank, folder, base):
    """Learn in a process group of two by `DistributedDataParallel`, and by FSDP2, and write down
    what came of it."""
    torch.set_num_threads(1)
    folder, found = Path(folder), {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found["ddp"] = learn(folder / "ddp", base)
    # accelerate shards on accelerators alone, unless it takes these processes for such.
    AcceleratorState._reset_state()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    found["shards"] = learn(folder / "shards", base, **SHARDED)
    found["stopped shards"] = learn(folder / "stopped shards", base, stop=3, **SHARDED)
    torch.save(found, folder / f"rank{rank}.pt")
    # Who leaves first closes connections that the other may still read.
    dist.barrier()
    dist.destroy_process_group()
