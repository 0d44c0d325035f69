"""Starts a run in two processes on this machine, as `accelerate launch` does. No tests here."""

import json
import os
import subprocess
import sys


def launch(worker, settings, folder):
    """What came of the run.

    Args:
        worker: program that takes a file of settings. settings: of the run.
        folder: where that file is written.
    """
    path = folder / "settings.json"
    path.write_text(json.dumps(settings.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(worker), str(path)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True)
