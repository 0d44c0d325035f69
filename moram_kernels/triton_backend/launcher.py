"""How kernels are launched, and where they can be: one function that every launch goes through."""

import functools
from collections.abc import Collection
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

from . import available

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Typed(Protocol):
    """What has a dtype: a tensor, or a `Table`."""

    @property
    def dtype(self) -> torch.dtype: ...


def launch(kernel: KernelInterface[Any], grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch a kernel on the device of its first tensor.

    Args:
        kernel: of `triton.jit`. grid: number of programs along each axis.
        args: its arguments, a tensor first. meta: its constants, warps and stages.
    """
    device = args[0].device
    if interpreting() and meta.get("PRECISION", "ieee") not in _interpreted_precisions():
        # A way to use tensor cores, which Triton's interpreter refuses; its products are exact.
        meta["PRECISION"] = "ieee"
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right by the vendor's library; counted as a launch like any kernel.

    16-bit operands only: for float32 the library may round to tf32 behind our back.
    """
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def multiply_add(base: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = base + left right by the vendor's library.

    Args:
        base: [M, N]; may be out. left: [M, D]. right: [D, N]. out: [M, N]. All of one 16-bit dtype.
    """
    torch.addmm(base, left, right, out=out)


def can_multiply(left: Tensor, right: Tensor) -> bool:
    """Whether `multiply` may be used."""
    usable = left.is_cuda and left.dtype == right.dtype and left.itemsize == 2
    # A float32 result of 16-bit operands is CUDA's alone, and not in every torch.
    return usable and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return isinstance(_dot_kernel, InterpretedFunction)


def _interpreted_precisions() -> Collection[str]:
    from triton.runtime.interpreter import interpreter_builder

    return interpreter_builder.options.allowed_dot_input_precisions


def target(device: torch.device) -> int | str:
    """Compute capability (90 for 9.0) or "gfx..." on AMD; the interpreter has an H100's."""
    return available.device_of(device).arch


def cdiv(size: int, block: int) -> int:
    """Blocks that cover a size; plain integers, because Triton's own takes microseconds."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not smaller than a positive size."""
    return 1 << (size - 1).bit_length()


def meet(*tensors: Typed) -> torch.dtype:
    """The dtype in which tensors meet in a product: a 16-bit one only if all have it.

    The result counts among them where a factor was computed in float32: rounding such a factor to
    16 bits is inside the error of a result of that dtype alone.
    """
    first, *rest = {t.dtype for t in tensors}
    return torch.float32 if rest else first


def summed(*tensors: Typed) -> torch.dtype:
    """The dtype of a factor that meets tensors in a sum over tokens: `meet`, but not float16.

    Tokens' factors differ by more than float16's range; the sum scales them where they meet.
    """
    met = meet(*tensors)
    return torch.float32 if met == torch.float16 else met


def dot_dtype(*tensors: Typed) -> tl.dtype:
    """`meet` as Triton's dtype, for a `tl.dot`."""
    return DTYPES[meet(*tensors)]


def rows(tensor: Tensor) -> Tensor:
    """The matrix with unit column stride, copied only if it has another one."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous()


@functools.cache
def interprets_bfloat16() -> bool:
    """Whether the interpreter multiplies bfloat16 rightly; Triton 3.8's multiplies bit patterns."""
    ones, out = torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    _dot_kernel[(1,)](ones, out)
    return bool((out == 16).all())


@triton.jit
def _dot_kernel(x_ptr, out_ptr):
    """out = x x for ones x [16, 16]; grid (1,)."""
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(x, x, input_precision="ieee"))
