"""The device of a run, and the peak memory of a stretch of work, in MiB (2^20 bytes)."""

import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Start a new stretch. Without Linux's /proc, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5 resets the high-water mark of the resident set, where a process may do that.
        with suppress(OSError):
            _CLEAR.write_text("5")


def peak_mib(device: torch.device) -> float:
    """Peak since `reset_peak`: of the device's allocations, or of the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def pick_device() -> torch.device:
    """The CUDA device, if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
