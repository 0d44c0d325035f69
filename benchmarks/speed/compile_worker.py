"""One process that compiles kernels for a GPU without touching it; `compile_ahead.py` starts it.

    python compile_worker.py FD      (a pickled `Order` on stdin)

The library plans and launches its own calls, on tensors in memory that nobody touches, and Triton
binds, specialises and compiles each launch for the machine that it is told; only the launch itself
is left out. So tiles, strides, alignment and options are those of the real launch, and so is the
entry in Triton's cache. Workers go through the same list; each kernel is compiled by the first that
claims it. Messages go to the file descriptor FD, a line of JSON each; see `compile_ahead.py`.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import gpu_cases
import gpu_parity
import triton
from triton.backends.compiler import GPUTarget

from moram_kernels.triton_backend import available, launcher
from moram_kernels.triton_backend.devices import Device


class Machine(NamedTuple):
    """The GPU that kernels are compiled for.

    device: as the plan knows it. target: (backend, arch, warp size) of Triton's `GPUTarget`.
    properties: Triton's of the device.
    launcher: (module, class) of Triton's launcher, built ahead as well, or None.
    """

    device: Device
    target: tuple
    properties: dict
    launcher: tuple | None = None


class Order(NamedTuple):
    """What a worker does: the machine, `Check`s and (Case, contender)s, a folder of claims."""

    machine: Machine
    items: list
    claims: Path
    worker: int
    started: float


class CompilingDriver:
    """Stands in for Triton's driver: knows a machine, loads nothing, calls launched(function)."""

    def __init__(self, machine, launched):
        self.machine, self.launched = machine, launched
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: machine.properties,
            # A module that is there, so that it is loaded once; 64 registers, no spills.
            load_binary=lambda name, binary, shared, device: (True, name, 64, 0, 1024),
            unload_module=lambda module: None,
            launch=None,
        )

    def get_current_target(self):
        return GPUTarget(*self.machine.target)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        if self.machine.launcher:
            module, name = self.machine.launcher
            # Triton 3.6 builds C code for each signature here; where that fails, the launch builds.
            with contextlib.suppress(Exception):
                getattr(importlib.import_module(module), name)(source, metadata)

        def launch(x, y, z, stream, function, *rest):
            self.launched(function)

        return launch


@contextlib.contextmanager
def pretend(machine, launched):
    """The library sees the machine's GPU, and Triton a driver that calls launched(function)."""
    for name in ("forward", "backward"):
        # Now, so that no module is first imported with the fakes in it.
        importlib.import_module(f"moram_kernels.triton_backend.{name}")
    can_multiply = launcher.can_multiply
    fakes = (
        (available.why_not, lambda device=None: None),
        (available.device_of, lambda device: machine.device),
        (launcher.can_multiply, lambda left, right: can_multiply(_on_gpu(left), right)),
        (launcher.multiply, lambda *args: None),
        (launcher.multiply_add, lambda *args: None),
    )
    driver, before = triton.runtime.driver, triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        for module in [m for n, m in sys.modules.items() if n.startswith("moram_kernels")]:
            # A module that imported a function has it under its own name.
            for name, value in list(vars(module).items()):
                for fake in (fake for real, fake in fakes if value is real):
                    stack.enter_context(mock.patch.object(module, name, fake))
        driver.set_active(CompilingDriver(machine, launched))
        stack.callback(driver.set_active, before)
        yield


def _on_gpu(tensor):
    return SimpleNamespace(is_cuda=True, dtype=tensor.dtype, itemsize=tensor.itemsize)


def launch_item(item, device):
    """Make all launches of a `Check`, or of a (Case, contender), planned for a `Device`."""
    if isinstance(item, gpu_parity.Check):
        case = gpu_parity.case_of(item)
        data = gpu_cases.blank_data(case, *gpu_parity.dtypes_of(item))
        gpu_cases.run_path(case, data, item.path, device, gpu_parity.settings_of(item))
        return
    case, contender = item
    gpu_cases.make_call(case, gpu_cases.blank_data(case), contender, device)()


class Worker:
    """Goes through the items and compiles what no other worker has claimed."""

    def __init__(self, order, send):
        self.order, self.send = order, send
        self.needs, self.claimed, self.facts = set(), None, {}

    def run(self):
        """Compile everything; what goes wrong is a message, since the real launch will say it."""
        triton.knobs.runtime.jit_cache_hook = self.before_compiling
        triton.knobs.compilation.listener = self.after_compiling
        self.send({"worker": self.order.worker, "ready": time.time() - self.order.started})
        with pretend(self.order.machine, self.launched):
            for index, item in enumerate(self.order.items):
                self.needs.clear()
                try:
                    launch_item(item, self.order.machine.device)
                except Exception as error:
                    problem = f"{item}: {type(error).__name__}: {' '.join(str(error).split())}"
                    self.send({"problem": problem[:400]})
                    self.launched(None)
                # Of the kernels that this worker compiled, it has said so already.
                self.send({"item": index, "needs": sorted(self.needs)})

    def before_compiling(self, *, key, fn, **_):
        """Triton's hook before it compiles or looks into its cache; true where it shall not."""
        label = hashlib.sha256(f"{fn.module}.{fn.name} {key}".encode()).hexdigest()[:16]
        self.needs.add(label)
        try:
            (self.order.claims / label).touch(exist_ok=False)
        except FileExistsError:
            return True
        self.claimed, self.facts, self.start = label, {"name": fn.name}, clocks()
        return False

    def after_compiling(self, *, cache_hit, **_):
        """Triton's listener: the kernel is in the cache on disk."""
        self.facts["new"] = not cache_hit

    def launched(self, function):
        """The kernel would run now; said of the one that was claimed, once."""
        if self.claimed:
            wall, cpu = (now - then for now, then in zip(clocks(), self.start, strict=True))
            times = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
            self.send({"kernel": self.claimed, **times, **self.facts})
            self.claimed = None


def clocks():
    """(seconds now, seconds of CPU so far, with those of the processes that this one started)."""
    return time.perf_counter(), sum(os.times()[:4])


def main():
    """Do the order on stdin, and write messages to the file descriptor that was given."""
    order = pickle.load(sys.stdin.buffer)
    channel = int(sys.argv[1])

    def send(message):
        # One write, and short, so that lines of several workers do not mix.
        os.write(channel, (json.dumps(message) + "\n").encode())

    # The program that waits for the kernels goes first.
    os.nice(5)
    with contextlib.suppress(BrokenPipeError):
        Worker(order, send).run()


if __name__ == "__main__":
    main()
