"""Every fault that the emulator promises to find, each in a kernel written by hand."""

import pytest
import torch
from hand_written import STORE, program, run
from ptx_text import Unsupported
from threads import Trap

ONE = "mov.b32 %r9, 1;"
# The word of the thread with the same place in the other of two warps.
OTHER = "xor.b32 %r6, %r4, 128; add.s32 %r7, %r3, %r6;"
READ_OTHER = OTHER + "ld.shared.b32 %r9, [%r7];"
WRITE = "st.shared.b32 [%r5], %r1;"
BARRIER = "bar.sync 0;"
# 16 bytes of each thread, from the output to shared memory.
COPY = (
    "shl.b32 %r6, %r1, 4; add.s32 %r7, %r3, %r6; cvt.u64.u32 %rd4, %r6; add.s64 %rd5, %rd1, %rd4;"
    "cp.async.cg.shared.global [%r7+0], [%rd5+0], 0x10;"
)
COMMIT = "cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"
READ_COPY = "ld.shared.b32 %r9, [%r7];"
# Threads from %r2 on skip the body.
SOME = "setp.ge.s32 %p1, %r1, %r2; @%p1 bra $L1; {} $L1:\nmov.b32 %r9, 0;"


def assert_trap(kind, body, **how):
    with pytest.raises(Trap) as caught:
        run(body, **how)
    assert caught.value.kind == kind, caught.value
    assert "PTX line" in str(caught.value)


def words(count):
    return torch.arange(count, dtype=torch.int32)


@pytest.mark.parametrize(
    "access", [ONE + STORE.replace("+0", "+4"), "ld.global.b32 %r9, [%rd3+4];"]
)
def test_access_behind_a_tensor(access):
    assert_trap("global", access)


def test_access_before_a_tensor():
    assert_trap("global", "ld.global.b32 %r9, [%rd3+-4];")


def test_access_between_the_rows_of_a_view():
    assert_trap("global", "ld.global.b32 %r9, [%rd3];", out=words(128).view(8, 16)[:, :12])


def test_access_between_the_elements_of_a_view():
    assert_trap("global", "ld.global.b32 %r9, [%rd3];", out=words(256)[::2])


def test_masked_access_touches_nothing():
    guarded = "setp.lt.s32 %p1, %r1, 8; mov.b32 %r9, 0; @%p1 ld.global.b32 %r9, [%rd3];"
    run(guarded, out=words(8))
    assert_trap("global", guarded.replace("8", "9", 1), out=words(8))


def test_misaligned_vector():
    assert_trap("alignment", "ld.global.v2.b32 {%r9, %r10}, [%rd3+0];", out=words(128))
    assert_trap("alignment", "st.shared.v2.b32 [%r5], {%r1, %r1};")


def test_store_to_an_argument():
    assert_trap("read-only", ONE + STORE, read_only=True)


def test_two_ctas_on_the_same_bytes():
    assert_trap("CTAs", ONE + STORE, grid=2)
    # One loads, the other one stores.
    body = "mov.u32 %r10, %ctaid.x; setp.eq.s32 %p1, %r10, FIRST; mov.b32 %r9, 0;"
    body += "@%p1 bra $L1;" + STORE + "bra.uni $L2; $L1: ld.global.b32 %r9, [%rd3]; $L2:"
    for loads in ("0", "1"):
        assert_trap("CTAs", body.replace("FIRST", loads), grid=2)
    run("ld.global.b32 %r9, [%rd3];", grid=2)


def test_shared_memory_out_of_range():
    assert_trap("shared", "st.shared.b32 [%r5+12200], %r1;")
    assert_trap("shared", "st.shared.b32 [%r5+-1024], %r1;")


def test_shared_memory_that_was_never_written():
    assert_trap("unwritten", "ld.shared.b32 %r9, [%r5];")


def test_read_after_a_write_of_another_warp():
    assert_trap("race", WRITE + READ_OTHER)
    run(WRITE + BARRIER + READ_OTHER)


def test_write_after_a_read_of_another_warp():
    body = WRITE + BARRIER + READ_OTHER + "{} st.shared.b32 [%r5], %r2;"
    assert_trap("race", body.format(""))
    run(body.format(BARRIER))


def test_write_after_a_write_of_another_warp():
    body = WRITE + "{}" + OTHER + "st.shared.b32 [%r7], %r1;"
    assert_trap("race", body.format(""))
    run(body.format(BARRIER))


def test_warps_may_write_the_same_to_one_place_but_nothing_else():
    assert_trap("race", "st.shared.b32 [%r3], %r1;")
    run("st.shared.b32 [%r3], %r2; ld.shared.b32 %r9, [%r3];")
    assert_trap("race", "st.global.b32 [%rd1], %r1;")
    run("st.global.b32 [%rd1], %r2;")


def test_a_warp_sees_its_own_writes():
    assert run(WRITE + "ld.shared.b32 %r9, [%r5];" + STORE).tolist() == list(range(64))


def test_use_of_a_copy_before_its_wait():
    for body in (
        COPY + COMMIT + READ_COPY,
        COPY + COMMIT + "cp.async.wait_group 1;" + READ_COPY,
        # Not in the group that is waited for.
        COPY + WAIT + READ_COPY,
        COPY + COMMIT + "st.shared.b32 [%r7], %r1;",
    ):
        assert_trap("copy", body, out=words(256))
    run(COPY + COMMIT + WAIT + READ_COPY, out=words(256))


def test_a_copy_is_its_own_warps_until_a_barrier():
    other = "xor.b32 %r6, %r6, 512; add.s32 %r7, %r3, %r6;" + READ_COPY
    assert_trap("race", COPY + COMMIT + WAIT + other, out=words(256))
    out = run(COPY + COMMIT + WAIT + BARRIER + other + STORE, out=words(256))
    assert out[:64].tolist() == [4 * (i ^ 32) for i in range(64)]


def test_warp_operation_of_a_part_of_a_warp():
    body = SOME.format("shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;")
    assert_trap("divergent", body, number=40)
    run(body, number=32)


def test_barrier_that_not_all_threads_reach():
    for number in (40, 32):
        assert_trap("barrier", SOME.format(BARRIER), number=number)
    run(SOME.format(BARRIER), number=64)


def test_endless_loop(monkeypatch):
    monkeypatch.setattr("machine.STEPS", 100)
    with pytest.raises(Trap, match="more than 100 blocks"):
        run("$L1: add.s32 %r2, %r2, 1; bra.uni $L1;")


@pytest.mark.parametrize(
    "body",
    [
        "mov.b32 %r9, %r8;",
        # Written on one side of a branch alone.
        "setp.lt.s32 %p1, %r1, 4; @%p1 bra $L1; mov.b32 %r8, 1;\n$L1:\nmov.b32 %r9, %r8;",
        # A guarded write may not happen.
        "setp.lt.s32 %p1, %r1, 4; @%p1 mov.b32 %r8, 1; mov.b32 %r9, %r8;",
    ],
)
def test_register_that_may_be_unwritten(body):
    with pytest.raises(Trap, match="%r8 may be read before it is written") as caught:
        program(body)
    assert caught.value.kind == "register"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("frobnicate.b32 %r9, %r1;", "the opcode is not known"),
        ("add.sat.s32 %r9, %r1, %r1;", "'sat' is not known"),
        ("min.ftz.f32 %r9, %r1, %r1;", "'ftz' is not known here"),
        ("atom.global.add.u32 %r9, [%rd3], 1;", "the opcode is not known"),
        ("bar.sync 1;", "only barrier 0"),
        ("ld.local.b32 %r9, [%rd3];", "'local' is not known"),
    ],
)
def test_what_is_not_known_names_itself_and_its_line(body, why):
    with pytest.raises(Unsupported, match=rf"PTX line 21: {body.split()[0]}: .*{why}"):
        program(body)


def test_error_of_the_emulator_names_the_line():
    with pytest.raises(Trap, match=r"PTX line 21: .*%clock") as caught:
        run("mov.u32 %r9, %clock;")
    assert caught.value.kind == "emulator"
