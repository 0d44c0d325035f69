"""A few cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

For a quick look and for comparing two runs of it; claims of speed come from `throughput.py`, which
interleaves the backends, and `gpu.py`. Runs where it finds itself: on the GPU if there is one, with
the Triton backend, and on the CPU. Each call is compared with the float64 reference first.
"""

import measure
import pytest
import torch

from moram_kernels.triton_backend import available

SHAPES = ((1, 160), (256, 64), (256, 1024))
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BACKENDS = {device: ["plain", "torch"] for device in DEVICES}
# Interpreted kernels are not worth a clock.
if "cuda" in BACKENDS and available.installed() and not available.interpreting():
    BACKENDS["cuda"].append("triton")
RUNS = [(device, backend) for device, backends in BACKENDS.items() for backend in backends]


@pytest.fixture(autouse=True)
def one_thread():
    """On shared machines two threads wait for each other and medians jump by factors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_timed(call, device):
    """The call, on a GPU with the wait for its end, which is part of what is timed."""
    if device == "cpu":
        return call

    def timed():
        result = call()
        torch.cuda.synchronize()
        return result

    return timed


@pytest.mark.parametrize(("device", "backend"), RUNS, ids=["-".join(run) for run in RUNS])
@pytest.mark.parametrize(("tokens", "atoms"), SHAPES, ids=[f"M{m}-N{n}" for m, n in SHAPES])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_update_throughput(benchmark, mode, tokens, atoms, device, backend):
    benchmark.group = f"{device} {mode} M{tokens}-N{atoms}-D256-O256-fp32"
    case = measure.Case(mode, width=256, tokens=tokens, atoms=atoms, device=device)
    data = measure.make_data(case)
    with torch.set_grad_enabled(case.training):
        calls = measure.make_calls(case, data, [backend])
        measure.check_calls(case, data, calls)
        benchmark(to_timed(calls[backend], device))
