"""One process of a run of `moram xtail` in several processes. No tests here.

Started by torchrun, as `accelerate launch` does: python xtail_worker.py SETTINGS.json
"""

import json
import sys

import torch
from xtail_support import tiny_clip

from moram.xtail.run import run_xtail
from moram.xtail.settings import XtailSettings

if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = XtailSettings(**json.load(file))
    run_xtail(settings, clip=tiny_clip())
    torch.distributed.destroy_process_group()
