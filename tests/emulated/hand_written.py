"""Small kernels by hand, for the tests of the emulator itself. No tests here.

Registers of every body: %r1 thread, %r2 the number, %r3 shared memory, %r5 the thread's word there;
%rd1 the output, %rd3 the thread's word there. %r9 to %r39, %rd4 to %rd19 and %p1 to %p8 are free.
"""

import numpy as np
import torch
from address_space import Space
from machine import Program

HEAD = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u32 k_param_1)
.reqntid THREADS
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<40>;
.reg .b64 %rd<20>;
ld.param.b64 %rd1, [k_param_0];
ld.param.b32 %r2, [k_param_1];
mov.u32 %r1, %tid.x;
mov.b32 %r3, global_smem;
shl.b32 %r4, %r1, 2;
add.s32 %r5, %r3, %r4;
cvt.u64.u32 %rd2, %r4;
add.s64 %rd3, %rd1, %rd2;
"""
# Bytes of shared memory of a CTA.
SHARED = 12288
STORE = "st.global.b32 [%rd3+0], {%r9};"


def program(body, threads=64, shared=SHARED):
    return Program(HEAD.replace("THREADS", str(threads)) + body + "\nret;\n}\n", shared)


def run(body, out=None, *, number=0, threads=64, grid=1, read_only=False):
    """The output (one int32 a thread, or the given tensor) after a kernel ran."""
    out = torch.zeros(threads, dtype=torch.int32) if out is None else out
    space = Space()
    address = space.add("out", out, read_only)
    program(body, threads).launch((grid, 1, 1), [address, number], space)
    return out


def computed(text, *inputs, dtype=np.int32):
    """What instructions leave in %r9 where %r10, %r11, .. hold inputs of 4 bytes each."""
    inputs = np.broadcast_arrays(*inputs)
    count = inputs[0].size
    threads = -(-count // 32) * 32
    cells = np.zeros((len(inputs) + 1, threads), np.int32)
    for row, values in zip(cells[1:], inputs, strict=True):
        row[:count] = np.ascontiguousarray(values.ravel()).view(np.int32)
    loads = (
        f"ld.global.b32 {{%r{9 + i}}}, [%rd3+{4 * threads * i}];" for i in range(1, len(cells))
    )
    out = run("".join(loads) + text + STORE, torch.from_numpy(cells), threads=threads)
    return out.numpy()[0, :count].view(dtype)
