"""Faults in kernels of Triton's language are found through its real compiler, and nothing stays."""

import pytest
import torch
import triton
import triton.language as tl
from emulated_driver import emulated
from threads import Trap

SIZE = 100


@triton.jit
def _add_kernel(x_ptr, out_ptr, limit, size, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out = x + 1 below a limit; grid (programs,), each from STEP of them on."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size)
    tl.store(out_ptr + offs, x + 1, mask=offs < limit)


def add(arch, limit=SIZE, step=64, kept=True, into=None):
    x = torch.arange(SIZE, dtype=torch.float32)
    out = torch.empty(SIZE) if into is None else x
    with emulated(arch, [x] if kept else []) as driver:
        _add_kernel[(2,)](x, out, limit, SIZE, BLOCK=64, STEP=step)
    return out, driver


@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_without_a_fault_gives_its_result(arch):
    out, driver = add(arch)
    assert torch.equal(out, torch.arange(1, SIZE + 1, dtype=torch.float32))
    (launched,) = driver.launched
    assert (launched.name, launched.dtypes) == ("_add_kernel", {"fp32"})
    assert launched.constants.items() >= {"BLOCK": 64, "STEP": 64, "num_warps": 4}.items()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("global", {"limit": 128}),
        ("CTAs", {"step": 32}),
        ("read-only", {"into": "x"}),
    ],
)
def test_fault_of_a_kernel_traps(kind, how):
    with pytest.raises(Trap, match=r"_add_kernel, PTX line \d+, CTA .*thread \d+") as caught:
        add(80, **how)
    assert caught.value.kind == kind


def test_memory_that_nobody_has_written_is_nan():
    with emulated(80):
        assert torch.empty(3).isnan().all()


def test_nothing_stays_after_a_fault():
    before = triton.runtime.driver._active, triton.knobs.runtime.add_stages_inspection_hook
    with pytest.raises(Trap):
        add(80, limit=128)
    after = triton.runtime.driver._active, triton.knobs.runtime.add_stages_inspection_hook
    assert after == before
    assert not torch.are_deterministic_algorithms_enabled()
