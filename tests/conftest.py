"""Session-wide setup: the repository and its benchmarks on the path, torch on one thread."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Appended, so that a benchmark's file name never hides another module.
sys.path.append(str(ROOT / "benchmarks"))

torch.set_num_threads(1)


@pytest.fixture(params=["small", "large"])
def route(request, monkeypatch):
    """Both ways of the torch backend: as small problems go, and as large ones do."""
    # Imported here, because the path above must be set first.
    from support import take_large_routes

    if request.param == "large":
        take_large_routes(monkeypatch)
    return request.param
