"""A few cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

For a quick look and for comparing two runs of it; claims of speed come from `throughput.py`, which
interleaves the backends. Each call is compared with the float64 reference before it is timed.
"""

import measure
import pytest
import torch

SHAPES = ((1, 160), (256, 64), (256, 1024))


@pytest.fixture(autouse=True)
def one_thread():
    """On shared machines two threads wait for each other and medians jump by factors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["plain", "torch"])
@pytest.mark.parametrize(("tokens", "atoms"), SHAPES, ids=[f"M{m}-N{n}" for m, n in SHAPES])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_update_throughput(benchmark, mode, tokens, atoms, backend):
    benchmark.group = f"{mode} M{tokens}-N{atoms}-D256-O256-fp32"
    case = measure.Case(mode, width=256, tokens=tokens, atoms=atoms)
    data = measure.make_data(case)
    with torch.set_grad_enabled(case.training):
        calls = measure.make_calls(case, data, [backend])
        measure.check_calls(case, data, calls)
        benchmark(calls[backend])
