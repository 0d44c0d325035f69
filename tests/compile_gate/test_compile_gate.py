"""The gate's cross-section, in a process of its own: here kernels may be interpreted."""

import os
import subprocess
import sys
from pathlib import Path

GATE = Path(__file__).with_name("gate.py")


def test_kernels_compile_without_spills_onto_tensor_cores():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", GATE, "--targets", "90", "--subset", "ci"],
        capture_output=True,
        text=True,
        env=environment,
    )
    verdict = run.stdout.rpartition("\n\n")[2]
    assert run.returncode == 0, f"{verdict}\n{run.stderr[-2000:]}"
