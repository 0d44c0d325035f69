"""Whether kernels can run, and where; imports Triton only when asked about it."""

import functools
import importlib.util
import re
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from .devices import INTERPRETER, Device, of_properties


def installed() -> bool:
    """Whether Triton can be imported."""
    # Once it is, torch.compile need not look through a cache, of which it warns.
    return "triton" in sys.modules or _found()


@functools.cache
def _found() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the Triton that kernels are compiled with, None without one; not imported.

    It comes under several names, for NVIDIA and AMD, so no package is asked for its version.
    """
    if "triton" in sys.modules:
        text = sys.modules["triton"].__version__
    else:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            return None
        text = Path(spec.origin).read_text(encoding="utf-8").partition("__version__")[2]
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def is_early() -> bool:
    """Whether Triton is one before 3.8, of which `tests/compile_gate` compiles 3.6.0."""
    version = triton_version()
    return version is not None and version < (3, 8)


def unbound(wide: bool) -> dict[str, int]:
    """What keeps ptxas from spilling to fit more programs on a unit: registers a thread, or {}.

    Args:
        wide: whether the kernel's tile is one that spills a little so before Triton 3.8.
    """
    return {"maxnreg": 255} if wide and is_early() else {}


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    if not installed():
        return False
    from . import launcher

    return launcher.interpreting()


def why_not(device: torch.device | None = None) -> str | None:
    """Why kernels cannot run (on a device), one sentence with the remedy, or None."""
    if not installed():
        return "Triton is not installed; it comes with torch on Linux (pip install triton)"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return (
            "there is no CUDA or ROCm GPU here; use a machine with one, backend="
            '"torch", or, to try the kernels slowly on a CPU, set TRITON_INTERPRET=1 before '
            "Python starts"
        )
    if device is not None and device.type != "cuda":
        return f'the tensors are on {device}; move them to the GPU or use backend="torch"'
    return _why_not_gpu(None if device is None else device.index)


def _why_not_gpu(index: int | None) -> str | None:
    return why_not_compiled(device_of(torch.device("cuda", index)))


# Of a GPU that is there nothing changes, so torch.compile need not look into it. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler.
_why_not_gpu._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def why_not_compiled(device: Device) -> str | None:
    """Why kernels do not compile well for a GPU with this Triton, one sentence, or None."""
    if device.why_not is None and device.target == "gfx942" and is_early():
        version = ".".join(map(str, triton_version() or ()))
        return (
            f"for {device.arch} ({device.name}) the kernels need Triton 3.8 or newer, because "
            f'{version} fails to compile them; install it, or use backend="torch", which "auto" '
            "takes there"
        )
    return device.why_not


def why_not_dtypes(dtypes: Collection[torch.dtype]) -> str | None:
    """Why these dtypes are not covered, one sentence, or None."""
    from . import launcher

    for dtype in dtypes:
        if dtype not in launcher.DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in launcher.DTYPES)
            return f"the kernels cover {names}, got {str(dtype).removeprefix('torch.')}"
    if torch.bfloat16 in dtypes and interpreting() and not launcher.interprets_bfloat16():
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32"
    return None


def device_of(device: torch.device) -> Device:
    """A torch device as plan, model and tiles know it; the interpreter's where it is no GPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    return of_properties(arch, properties)


def device_name(device: torch.device) -> str:
    """The name by which tables know a device."""
    return device_of(device).name
