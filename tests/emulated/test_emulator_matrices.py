"""Matrices of warps and warpgroups against numpy, and what wgmma must wait for."""

import numpy as np
import pytest
import torch
from hand_written import run
from machine import SHARED_BASE
from threads import Trap

RNG = np.random.default_rng(0)
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def halves(matrix, dtype=torch.bfloat16):
    return torch.tensor(matrix, dtype=torch.float32).to(dtype).view(torch.int16).numpy()


def pairs(cells, row, column):
    """Registers with the numbers at (row, column) and (row, column + 1)."""
    return cells[row, column].astype(np.uint16).astype(np.uint32) | (
        cells[row, column + 1].astype(np.uint16).astype(np.uint32) << 16
    )


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_product_of_a_warp(name, dtype, depth):
    a, b = RNG.integers(-3, 4, (16, depth)), RNG.integers(-3, 4, (8, depth))
    c = RNG.integers(-9, 9, (16, 8)).astype(np.float32)
    x, y = halves(a, dtype), halves(b, dtype)
    left = [pairs(x, G + 8 * r, 2 * T + 8 * k) for k in range(depth // 8) for r in range(2)]
    right = [pairs(y, G, 2 * T + 8 * k) for k in range(depth // 8)]
    start = [c[G + 8 * (i // 2), 2 * T + i % 2].view(np.uint32) for i in range(4)]
    rows = np.stack([*left, *right, *start])
    names = [f"%r{10 + i}" for i in range(len(rows))]
    body = "".join(f"ld.global.b32 {{{name}}}, [%rd3+{128 * i}];" for i, name in enumerate(names))
    n = len(left)
    operands = (names[:n], names[n : n + len(right)], names[-4:])
    groups = ", ".join("{" + ",".join(part) + "}" for part in operands)
    shape = f"m16n8k{depth}.row.col.f32.{name}.{name}.f32"
    body += f"mma.sync.aligned.{shape} {{%r30,%r31,%r32,%r33}}, {groups};"
    body += "".join(f"st.global.b32 [%rd3+{128 * i}], %r{30 + i};" for i in range(4))
    out = run(body, torch.from_numpy(rows.view(np.int32).copy()), threads=32)
    found = out[:4].numpy().view(np.float32)
    product = a @ b.T + c
    for i in range(4):
        assert (found[i] == product[G + 8 * (i // 2), 2 * T + i % 2]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_through_shared_memory_and_back(transposed):
    cells = RNG.integers(0, 2**15, (2, 8, 8)).astype(np.int16)
    words = torch.from_numpy(cells.reshape(-1).view(np.int32).copy())  # 2 registers of 32 threads
    how = ".trans" if transposed else ""
    # Threads 0 to 15 name rows of 16 bytes; the others repeat them.
    body = f"""
ld.global.b32 %r10, [%rd3];
ld.global.b32 %r11, [%rd3+128];
and.b32 %r12, %r1, 15;
shl.b32 %r13, %r12, 4;
add.s32 %r14, %r3, %r13;
stmatrix.sync.aligned.m8n8.x2{how}.shared.b16 [%r14], {{%r10, %r11}};
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r15, %r16}}, [%r14];
st.global.b32 [%rd3], %r15;
st.global.b32 [%rd3+128], %r16;
"""
    out = run(body, words, threads=32)
    found = out.numpy().view(np.int16).reshape(2, 8, 8)
    assert (found == (cells.swapaxes(1, 2) if transposed else cells)).all()


def test_matrix_load_may_transpose():
    cells = RNG.integers(0, 2**15, (8, 8)).astype(np.int16)
    body = """
ld.global.b32 %r10, [%rd3];
st.shared.b32 [%r5], %r10;
and.b32 %r12, %r1, 7;
shl.b32 %r13, %r12, 4;
add.s32 %r14, %r3, %r13;
ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r15}, [%r14];
st.global.b32 [%rd3], %r15;
"""
    out = run(body, torch.from_numpy(cells.reshape(-1).view(np.int32).copy()), threads=32)
    assert (out.numpy().view(np.int16).reshape(8, 8) == cells.T).all()


# A product of a warpgroup. Shared memory holds b [8, 16] and, 4096 bytes on, a [64, 16].
LEFT = 4096


def in_shared(rows, width, offset):
    """Byte of each element [rows, 16], in rows of `width` bytes, swizzled as the manual says."""
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if width == 16:
        # 8 x 8 matrices one after the other: 128 bytes along k, 256 along rows.
        return offset + row // 8 * 256 + row % 8 * 16 + k // 8 * 128 + k % 8 * 2
    chunk = k * 2 // 16 ^ row * width // 128 % (width // 16)
    return offset + row * width + chunk * 16 + k * 2 % 16


def descriptor(width, offset):
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[width]
    lead, stride = (128, 256) if width == 16 else (16, 8 * width)
    start = SHARED_BASE + offset
    return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | mode << 62


FILL = """
shl.b32 %r6, %r1, 4;
add.s32 %r7, %r3, %r6;
cvt.u64.u32 %rd4, %r6;
add.s64 %rd5, %rd1, %rd4;
""" + "".join(
    f"ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd5+{at}];"
    f"st.shared.v4.b32 [%r7+{at}], {{%r10, %r11, %r12, %r13}};"
    for at in range(0, 12288, 2048)
)
FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
FINISH = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def multiply(width, twice=False):
    a, b = (f"mov.b64 %rd{n}, {descriptor(width, at)};" for n, at in ((10, LEFT), (11, 0)))
    shape = "m64n8k16.f32.bf16.bf16"
    text = "wgmma.fence.sync.aligned; setp.ne.s32 %p1, %r1, %r1;" + a + b
    start = "".join(f"mov.b32 %r{30 + i}, 0;" for i in range(4))
    once = f"wgmma.mma_async.sync.aligned.{shape} {{%r30,%r31,%r32,%r33}}, %rd10, %rd11, "
    text += start + once + "%p1, 1, 1, 0, 0;"
    return text + (once + "1, 1, 1, 0, 0;" if twice else "")


def filled(width):
    """(a, b, what the output holds before the kernel copies it to shared memory)."""
    a, b = RNG.integers(-3, 4, (64, 16)), RNG.integers(-3, 4, (8, 16))
    memory = np.zeros(12288 // 2, np.int16)
    memory[in_shared(64, width, LEFT) // 2] = halves(a)
    memory[in_shared(8, width, 0) // 2] = halves(b)
    return a, b, torch.from_numpy(memory.view(np.int32).copy())


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_product_of_a_warpgroup(width):
    a, b, memory = filled(width)
    body = FILL + FENCE + BARRIER + multiply(width, twice=True) + FINISH
    # The output starts with what other threads have copied before.
    body += "".join(f"st.global.b32 [%rd3+{512 * i}], %r{30 + i};" for i in range(4))
    out = run(body, memory, threads=128)
    found = out[: 4 * 128].view(torch.float32).numpy().reshape(4, 4, 32)
    product = 2 * (a @ b.T)
    for i in range(4):
        for warp in range(4):
            rows = 16 * warp + G + 8 * (i // 2)
            assert (found[i, warp] == product[rows, 2 * T + i % 2]).all()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("proxy", FILL + BARRIER + multiply(32) + FINISH),
        ("race", FILL + FENCE + multiply(32) + FINISH),
        ("unwritten", multiply(32) + FINISH),
        ("wgmma", FILL + FENCE + BARRIER + multiply(32) + BARRIER + "st.shared.b32 [%r5], %r1;"),
        ("divergent", FILL + FENCE + BARRIER + "setp.lt.s32 %p2, %r1, 32; @%p2 bra $L1;"
         + multiply(32) + "$L1:"),
    ],
)  # fmt: skip
def test_product_of_a_warpgroup_traps(kind, body):
    _, _, memory = filled(32)
    with pytest.raises(Trap) as caught:
        run(body, memory, threads=128)
    assert caught.value.kind == kind, caught.value
