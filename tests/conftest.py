"""Session-wide setup: the repository and its benchmarks on the path, the threads of torch."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("benchmarks", "benchmarks/speed", "benchmarks/streams")
sys.path.insert(0, str(ROOT))
# Appended, so that a file name never hides another module: what tests share, and benchmarks.
sys.path += [str(ROOT / path) for path in ("tests/moram", *BENCHMARKS)]


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="CPU threads of torch, default 1")


def pytest_configure(config):
    # Before any fixture: what a session or a module shares is made with as many.
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(autouse=True)
def threads(request):
    """Each test starts with the threads of the session: a run of the library sets its own."""
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture(params=["small", "large"])
def route(request, monkeypatch):
    """Both ways of the torch backend: as small problems go, and as large ones do."""
    # Imported here, because the path above must be set first.
    from support import take_large_routes

    if request.param == "large":
        take_large_routes(monkeypatch)
    return request.param
