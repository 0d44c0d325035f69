"""One process of a run of `moram xtail` in several processes. No tests here.

Started by torchrun, as `accelerate launch` does: python xtail_worker.py SETTINGS.json
"""

import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    # The package as the tests have it, and what they share.
    sys.path += [str(Path(__file__).resolve().parents[2])]
    from xtail_support import tiny_clip

    from moram.xtail.run import run_xtail
    from moram.xtail.settings import XtailSettings

    with open(sys.argv[1], encoding="utf-8") as file:
        settings = XtailSettings(**json.load(file))
    run_xtail(settings, clip=tiny_clip())
    torch.distributed.destroy_process_group()
