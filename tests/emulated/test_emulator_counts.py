"""What counts say of kernels written by hand, worked out on paper. Two warps run each."""

import pytest
import torch
from address_space import Space
from counts import Counts
from hand_written import STORE, program

ONE = "mov.b32 %r9, 1;"


def counted(body, words=64, number=0):
    counts, space, out = Counts(), Space(), torch.zeros(words, dtype=torch.int32)
    program(body).launch((1, 1, 1), [space.add("out", out), number], space, counts)
    return counts


def test_instructions_are_counted_for_each_warp_by_class():
    body = ONE + "bar.sync 0;" + "st.shared.b32 [%r5], %r1;" + STORE
    # Before the body stand 2 parameters, 2 moves and 4 of arithmetic, behind it a return.
    expected = {"param": 2, "move": 3, "arithmetic": 4, "barrier": 1, "branch": 1}
    expected |= {"shared": 1, "global": 1}
    assert counted(body).instructions == {name: 2 * n for name, n in expected.items()}


@pytest.mark.parametrize(("number", "warps"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_only_warps_with_an_active_thread_count(number, warps):
    body = "setp.ge.s32 %p1, %r1, %r2; @%p1 bra $L1; ex2.approx.ftz.f32 %r9, %r9;\n$L1:\n"
    assert counted(ONE + body, number=number).instructions["special"] == warps


@pytest.mark.parametrize(
    ("apart", "sectors"),
    [
        (0, 1),  # one word for all: one sector a warp
        (4, 4),  # 128 bytes in a row
        (8, 8),
        (32, 32),  # a sector each
        (256, 32),
    ],
)
def test_sectors_of_a_warp(apart, sectors):
    body = f"mul.lo.u32 %r6, %r1, {apart}; cvt.u64.u32 %rd4, %r6; add.s64 %rd5, %rd1, %rd4;"
    totals = counted(body + "ld.global.b32 %r9, [%rd5];", words=64 * 64).tensors["out", "load"]
    moved = 32 * (1 if apart == 0 else sectors)
    assert totals == {"asked": 256, "moved": 2 * moved, "instructions": 2}


def test_stores_are_kept_apart_from_loads_and_masked_threads_left_out():
    body = ONE + "setp.lt.s32 %p1, %r1, 8; @%p1 st.global.b32 [%rd3], %r9;"
    tensors = counted(body).tensors
    assert tensors == {("out", "store"): {"asked": 32, "moved": 32, "instructions": 1}}


@pytest.mark.parametrize(
    ("apart", "access", "passes", "ideal"),
    [
        (4, "st.shared.b32 [%r7], %r1;", 1, 1),
        # All threads of a warp write the same number here.
        (0, "st.shared.b32 [%r3], %r2;", 1, 1),
        (8, "st.shared.b32 [%r7], %r1;", 2, 1),
        (128, "st.shared.b32 [%r7], %r1;", 32, 1),
        # 16 bytes a thread: 8 threads at once.
        (16, "st.shared.v4.b32 [%r7], {%r1, %r1, %r1, %r1};", 4, 4),
        (32, "st.shared.v4.b32 [%r7], {%r1, %r1, %r1, %r1};", 8, 4),
        # 8 bytes a thread: 16 threads at once.
        (8, "st.shared.v2.b32 [%r7], {%r1, %r1};", 2, 2),
    ],
)
def test_passes_over_shared_memory(apart, access, passes, ideal):
    body = f"mul.lo.u32 %r6, %r1, {apart}; add.s32 %r7, %r3, %r6; mov.b32 %r2, 7;" + access
    # Where both warps write one place, only one of them may.
    body = "setp.ge.s32 %p1, %r1, 32; @%p1 bra $L1;" + body + "\n$L1:\n"
    counts = counted(body)
    assert (counts.wavefronts, counts.ideal) == (passes, ideal)
