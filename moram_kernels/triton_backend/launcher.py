"""How kernels are launched, and where they can be: one function that every launch goes through."""

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import or_
from types import CodeType
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelInterface

from ..aliases import Rule
from ..calls import Course
from . import available

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TINY = torch.finfo(torch.float32).tiny
_HERE = nullcontext()
_ADDRESS = torch.Tensor.data_ptr


class Typed(Protocol):
    """What has a dtype: a tensor, or a `Table`."""

    @property
    def dtype(self) -> torch.dtype: ...


class Launch(NamedTuple):
    """A kernel, its grid, its numbers, which follow its tensors, and its constants."""

    kernel: KernelInterface[Any]
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]


class Step(NamedTuple):
    """A launch as a compiled kernel wants it, for tensors of the same signature."""

    described: CodeType
    odd: Any
    compiled: CompiledKernel
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    packed: Any
    rest: tuple[Any, ...]


class Steps:
    """The launches of one call in their order, which calls of one course and kind share.

    Args:
        kind: what decides which kernels run beside what is in the course.
    """

    __slots__ = ("course", "kind", "known", "made", "stream")

    def __init__(self, course: Course, kind: Hashable = None) -> None:
        self.course, self.kind = course, kind
        self.known: Iterator[Step | None] = iter(course.launches.get(kind, ()))
        self.made: list[Step | None] = []
        driver = triton.runtime.driver.active
        self.stream: Any = driver.get_current_stream(driver.get_current_device())

    def end(self) -> None:
        """The call is over; the first one of its kind leaves its launches to the others."""
        if self.made:
            self.course.launches.setdefault(self.kind, self.made)


def launch(
    tensors: Sequence[Tensor], describe: Callable[[], Launch], steps: Steps | None = None
) -> None:
    """Launch a kernel on the current device's stream.

    Triton's own path binds and specialises all arguments anew, which takes longer than the call of
    the compiled kernel. Where that is known, it is called directly.

    Args:
        tensors: the kernel's tensors, which are its first arguments, in their order.
        describe: the rest, from what is in the signature of the call alone.
        steps: the launches of the call, or None to take Triton's own path.
    """
    if steps is None:
        kernel, grid, numbers, constants = describe()
        start(kernel, grid, *tensors, *numbers, **constants)
        return
    # What Triton specialises on beside the signature: whether a pointer is a multiple of 16.
    odd: Any = functools.reduce(or_, map(_ADDRESS, tensors)) & 15
    if odd:
        odd = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    step = next(steps.known, None)
    if step is not None and step.odd == odd and step.described is describe.__code__:
        _, _, _, run, grid, function, packed, rest = step
        run(*grid, steps.stream, function, packed, None, None, None, *tensors, *rest)
        return
    kernel, grid, numbers, constants = described = describe()
    compiled = start(kernel, grid, *tensors, *numbers, **constants)
    steps.made.append(_step(described, len(tensors), compiled, odd, describe.__code__))


def start(kernel: KernelInterface[Any], grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """Launch by Triton's own path, on the device of the first argument.

    Args:
        kernel: of `triton.jit`. grid: number of programs along each axis.
        args: its tensors, then its numbers. constants: with warps and stages.
    Returns:
        the compiled kernel; None in Triton's interpreter.
    """
    if interpreting():
        # Ways to use tensor cores, which Triton's interpreter refuses; its products are exact.
        for name in ("PRECISION", "PRECISION_VALUES"):
            if constants.get(name, "ieee") not in _interpreted_precisions():
                constants[name] = "ieee"
    with on(args[0].device):
        return kernel[grid](*args, **constants)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block this is the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE


def _step(
    described: Launch, num_tensors: int, compiled: Any, odd: Any, code: CodeType
) -> Step | None:
    """What launches a compiled kernel again; None where Triton's own path must do it."""
    # AMD's compiler also specialises on the size of the memory that is behind a pointer.
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return None
    kernel, grid, numbers, constants = described
    names = kernel.arg_names[num_tensors + len(numbers) :]
    rest = (*numbers, *(constants[name] for name in names))
    x, y, z = (*grid, 1, 1)[:3]
    function, packed = compiled.function, compiled.packed_metadata
    return Step(code, odd, compiled, compiled.run, (x, y, z), function, packed, rest)


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
        base: [N]. left: [M, D]. right: [D, N]. out: [M, N]. All of one 16-bit dtype.
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


def numbers_of(rule: Rule) -> tuple[float, float, float]:
    """(1 / temperature, threshold, eps) for a kernel, which divides by float32 numbers."""
    return 1.0 / rule.temperature, rule.threshold, max(rule.eps, _TINY)


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
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            return torch.float32
    return dtype


def summed(*tensors: Typed) -> torch.dtype:
    """The dtype of a factor that meets tensors in a sum over tokens: `meet`, but not float16.

    Tokens' factors differ by more than float16's range; the sum scales them where they meet.
    """
    met = meet(*tensors)
    return torch.float32 if met == torch.float16 else met


def precision_of_sum(precision: str, out: Typed) -> str:
    """The precision of a sum of rows whose factors were computed in float32.

    Three products of bfloat16 parts err by 2^-16 of the largest terms, 2^7 times less than the one
    rounding of a 16-bit result.

    Args:
        precision: of float32 products. out: the result.
    """
    return "bf16x3" if precision == "bf16x6" and out.dtype.itemsize == 2 else precision


def dot_dtype(*tensors: Typed) -> tl.dtype:
    """`meet` as Triton's dtype, for a `tl.dot`."""
    return DTYPES[meet(*tensors)]


def new_matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An empty matrix [rows, columns] on a tensor's device, its rows a multiple of 16 apart.

    Rows of a multiple of 16 numbers are stored in whole vectors.

    Args:
        like: a tensor on the device. rows, columns, dtype: of the matrix.
    """
    return like.new_empty_strided((rows, columns), (-(-columns // 16) * 16, 1), dtype=dtype)


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
