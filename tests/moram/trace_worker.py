"""One process of a run of `moram trace` in several processes. No tests here.

Started by torchrun, as `accelerate launch` does: python trace_worker.py SETTINGS.json
"""

import json
import sys

import torch
from torch.distributed.tensor import DTensor

from moram.trace import run
from moram.trace.settings import TraceSettings

if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = TraceSettings(**json.load(file))
    shard = run.shard

    def count_shards(model):
        """Say what is shared out, for the test."""
        shard(model)
        base = [p for p in model.parameters() if not p.requires_grad]
        print(f"sharded {sum(isinstance(p, DTensor) for p in base)} of {len(base)}")

    run.shard = count_shards
    run.run_trace(settings)
    torch.distributed.destroy_process_group()
