"""What a bug report needs: versions, processor, devices, and which backends of the operator run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    import torch

# Of plain types: what JSON holds.
Answers = dict[str, Any]

# By the names that are imported.
PACKAGES = ("torch", "triton", "transformers", "open_clip", "accelerate", "safetensors", "numpy")
# What decides how fast, and with what rounding, a CPU multiplies: of x86, then of Arm.
FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq")
FLAGS += ("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16")
FLAGS += ("amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")
DTYPES = ("float32", "bfloat16", "float16")
CPUINFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Answers]:
    """What is installed and what runs here.

    Returns:
        A dict of dicts. Where asking fails, "error" stands for the answers.
        versions: by package, of those that are installed. system: platform and kind of Python.
        torch: the CUDA and the ROCm that it was built for, or None; whether it finds a GPU.
        cpu: its name, the instruction set that torch uses of it, and which of `FLAGS` it has, None
        where the system does not tell. threads: those of torch, and CPUs.
        devices: by torch's name. auto is what backend="auto" takes there, by dtype. triton is,
        where kernels run on some device, why they do not on this one, or None.
        backends: by name, whether it runs here, and if not, why.
    """
    asked = {
        "versions": _versions,
        "system": _system,
        "torch": _torch,
        "cpu": _cpu,
        "threads": _threads,
        "devices": _devices,
        "backends": _backends,
    }
    return {name: _answer(ask) for name, ask in asked.items()}


def to_text(found: Mapping[str, Any], indent: str = "") -> list[str]:
    """The lines of `environment`, for people; what is None is left out."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *to_text(value, f"{indent}  ")]
        elif value is not None:
            if isinstance(value, bool):
                value = "yes" if value else "no"
            said = " ".join(value) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {said}")
    return lines


def _answer(ask: Callable[[], Answers]) -> Answers:
    try:
        return ask()
    # A library that cannot even be asked is what the report is about.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> Answers:
    found = {"python": platform.python_version(), "moram": __version__}
    owners = packages_distributions()
    return found | {name: version(owners[name][0]) for name in PACKAGES if name in owners}


def _system() -> Answers:
    return {"platform": platform.platform(), "python": platform.python_implementation()}


def _torch() -> Answers:
    import torch

    found = torch.cuda.is_available()
    return {"cuda": torch.version.cuda, "rocm": torch.version.hip, "gpu_found": found}


def _cpu() -> Answers:
    import torch

    name, flags = _processor(CPUINFO.read_text() if CPUINFO.exists() else "")
    return {
        "name": name or platform.processor() or platform.machine(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "flags": flags,
    }


def _processor(cpuinfo: str) -> tuple[str | None, list[str] | None]:
    """The name of the first processor in /proc/cpuinfo, and those of `FLAGS` that it has."""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in lines}
    flags = found.get("flags", found.get("Features"))
    has = None if flags is None else [flag for flag in FLAGS if flag in flags.split()]
    return found.get("model name"), has


def _threads() -> Answers:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "usable_cpus": usable,
        "cpus": os.cpu_count(),
    }


def _devices() -> Answers:
    import torch

    devices = [torch.device("cpu")]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        devices += [torch.device(found.type, i) for i in range(torch.accelerator.device_count())]
    return {str(device): _answer(lambda device=device: _device(device)) for device in devices}


def _device(device: torch.device) -> Answers:
    import torch

    from moram_kernels.api import why_unavailable

    found = {}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["name"] = about.name
        found["capability"] = f"{about.major}.{about.minor}"
        found["memory_gib"] = round(about.total_memory / 2**30, 1)
    found["auto"] = {name: _pick("auto", device, name) for name in DTYPES}
    found["triton"] = None if why_unavailable("triton") else _refusal("triton", device)
    return found


def _pick(backend: str, device: torch.device, dtype: str) -> str:
    """The backend that runs for one atom and one token."""
    import torch

    from moram_kernels.aliases import Bank
    from moram_kernels.api import pick_backend

    row = torch.zeros(1, 1, dtype=getattr(torch, dtype), device=device)
    return pick_backend(backend, row, Bank(row, row, row[:0], row[:0]), 1)


def _refusal(backend: str, device: torch.device) -> str | None:
    try:
        _pick(backend, device, "float32")
    except RuntimeError as error:
        return str(error)
    return None


def _backends() -> Answers:
    from moram_kernels.api import BACKENDS, why_unavailable

    reasons = {name: why_unavailable(name) for name in BACKENDS if name != "auto"}
    return {name: {"runs": why is None, "reason": why} for name, why in reasons.items()}
