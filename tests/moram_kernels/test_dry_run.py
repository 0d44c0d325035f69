"""The whole road to a launch, without a GPU: Triton's runtime binds, specialises and compiles every
kernel that the operator launches, for an H100; only the launch itself is recorded, not done."""

from types import SimpleNamespace

import pytest
import torch
import triton
from support import make_case
from triton.backends.compiler import GPUTarget

from moram_kernels import SelfActivation, fused_ops, retrieve, retrieve_linear, sharing
from moram_kernels.triton_backend import available
from moram_kernels.triton_backend.devices import H100

# Limits of a CUDA grid, per dimension.
GRID = (2**31 - 1, 65535, 65535)
SHARED_BYTES = 227 * 1024


class RecordingDriver:
    """Stands in for the CUDA driver: knows an H100, loads nothing, records launches."""

    def __init__(self):
        self.launched = []
        properties = {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (None, name, 64, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        def record(x, y, z, stream, function, *rest):
            assert all(0 < size <= limit for size, limit in zip((x, y, z), GRID, strict=True))
            self.launched.append(function)

        return record


@pytest.fixture
def driver(monkeypatch):
    recorder = RecordingDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder)
    monkeypatch.setattr(available, "why_not", lambda device=None: None)
    monkeypatch.setattr(available, "device_of", lambda device: H100)
    return recorder


# Path: launches of the forward and of the backward; both segments, so no library products.
FORWARD = {
    "resident": ["_resident_kernel"],
    "split-dense": ["_score_kernel", "_select_kernel", "_aggregate_kernel"],
    "split-gather": ["_score_kernel", "_select_kernel", "_gather_kernel"],
}
BANK = ["_bank_gradient_kernel", "_sum_splits_kernel"]
BACKWARD = {
    "dense": ["_score_kernel", "_rows_backward_kernel", "_aggregate_kernel", *BANK],
    "lists": [
        "_lists_backward_kernel",
        "_gram_kernel",
        "_score_kernel",
        "_gather_kernel",
        "_bank_gradient_kernel",
    ],
}


def force(monkeypatch, path):
    plan = fused_ops.plan
    monkeypatch.setattr(fused_ops, "plan", lambda *a, **k: plan(*a, **(k | {"path": path})))


@pytest.mark.parametrize("path", FORWARD)
def test_training_binds_and_compiles(path, driver, monkeypatch):
    force(monkeypatch, path)
    case = make_case(0, (200,), 40, 8, 128, 128, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (case.x, case.current_keys, case.current_values)]
    output = retrieve(
        case.x,
        case.keys,
        case.values,
        case.activation,
        current_keys=case.current_keys,
        current_values=case.current_values,
        residual=case.residual,
        training=True,
        backend="triton",
    )
    assert driver.launched == FORWARD[path]
    driver.launched.clear()
    output.backward(case.grad)
    assert driver.launched == BACKWARD["lists" if path == "split-gather" else "dense"]
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("frozen", [100, 9000], ids=["registers", "chunks"])
def test_inference_of_a_large_bank_binds_and_compiles(frozen, driver, monkeypatch):
    force(monkeypatch, "split-gather")
    case = make_case(0, (70,), frozen, 8, 64, 96, dtype=torch.float16, training=False)
    retrieve(case.x, case.keys, case.values, case.activation, backend="triton")
    select = ["_select_kernel"] if frozen < 8192 else ["_chunk_kernel", "_combine_kernel"]
    assert driver.launched == ["_score_kernel", *select, "_gather_kernel"]


def test_decode_binds_and_compiles(driver):
    case = make_case(0, (3,), 40, 0, 512, 128, dtype=torch.bfloat16, training=False)
    weight = torch.zeros(128, 512, dtype=torch.bfloat16)
    retrieve_linear(case.x, weight, None, case.keys, case.values, case.activation, backend="triton")
    assert driver.launched == ["_score_kernel", "_decode_kernel"]


@pytest.mark.parametrize("count", [2, 3])
def test_shared_scores_bind_and_compile(count, driver, monkeypatch):
    force(monkeypatch, "split-dense")
    sizes = ((40, 8), (1, 3), (20, 16))[:count]
    cases = [make_case(0, (200,), *size, 128, 64, dtype=torch.bfloat16) for size in sizes]
    banks = [
        (
            c.keys,
            c.values,
            *(c.keys[:0] if t is None else t for t in (c.current_keys, c.current_values)),
        )
        for c in cases
    ]
    found = sharing.shared_scores(
        cases[0].x, banks, SelfActivation(4), training=True, backend="triton"
    )
    assert driver.launched == ["_shared_score_kernel"]
    assert [s.shape[1] for s in found] == [sum(size) for size in sizes]
