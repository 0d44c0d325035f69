"""The gate's cross-section, in a process of its own, and what it calls a fault."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gate
import machine_code

GATE = Path(__file__).with_name("gate.py")


def run(*command):
    """Run Python with the arguments, where kernels are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_kernels_compile_without_spills_onto_tensor_cores():
    done = run(GATE, "--targets", "90", "--subset", "ci")
    verdict = done.stdout.rpartition("\n\n")[2]
    assert done.returncode == 0, f"{verdict}\n{done.stderr[-2000:]}"


def test_a_triton_version_without_recorded_numbers_is_refused():
    code = (
        "import runpy, sys, triton\n"
        "triton.__version__ = '3.7.1'\n"
        f"sys.path.insert(0, {str(GATE.parent)!r})\n"
        f"sys.argv = ['gate.py', '--only', 'nothing']\n"
        f"runpy.run_path({str(GATE)!r}, run_name='__main__')"
    )
    done = run("-c", code)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1] == (
        "gate.py: error: Triton must be 3.6.0 or 3.8.0, of which numbers are recorded, got 3.7.1; "
        "run `make gate TRITON=3.8.0`, or look at the numbers of this version and record them with "
        "--update"
    )


# What ptxas 12.8 said of a score kernel, and of one without that fault.
SERIALISED = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to non wgmma instructions defining accumulator registers of a wgmma between start and end of \
the pipeline stage in the function '_score_kernel'
ptxas info    : 0 bytes gmem
"""
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_score_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_products_that_wait_for_each_other_fail():
    kernel = SimpleNamespace(dots=0)
    facts = dict.fromkeys(("stack", "local", "shared", "narrow_offsets", "instructions"), 0)
    for log, wrong in (
        (SERIALISED, ["ptxas lets no products of warp groups overlap (C7515)"]),
        (CLEAN, []),
    ):
        found = facts | {"serialised": machine_code.serialised(log)}
        assert gate.check(kernel, "sm_90", found, facts) == wrong
