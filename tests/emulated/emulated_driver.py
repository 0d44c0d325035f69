"""A CUDA driver that is none: Triton binds, specialises and compiles; the emulator launches.

    with emulated(80, "resident") as driver:
        retrieve(x, keys, values, activation, backend="triton")  # tensors of the CPU

Only this module knows the project's kernels.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from address_space import Space
from machine import Program
from triton.backends.compiler import GPUTarget

from moram_kernels.triton_backend import available
from moram_kernels.triton_backend.devices import A100, H100

DEVICES = {80: A100, 90: H100}


class EmulatingDriver:
    """What Triton's runtime asks of a driver.

    Args:
        arch: compute capability, 80 or 90. kept: tensors whose memory no kernel may write to.
    """

    def __init__(self, arch, kept=()):
        self.arch = arch
        self.kept = {tensor.untyped_storage().data_ptr() for tensor in kept}
        # Names of the kernels that ran, in order, and all opcodes that they have.
        self.launched, self.opcodes = [], set()
        device = DEVICES[arch]
        properties = {"max_shared_mem": device.shared, "multiprocessor_count": device.units}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        # Triton remembers kernels by device; every target has its own, and 0 is others'.
        return self.arch

    def get_current_stream(self, device):
        return 0

    def _load(self, name, binary, shared, device):
        # No module, so that nothing is unloaded; no spills; at most 1024 threads.
        return None, Program(binary.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        names = list(source.signature)
        passed = {name for name, kind in source.signature.items() if kind != "constexpr"}

        def launch(x, y, z, stream, program, packed, about, enter, leave, *args):
            # The compiled kernel outlives the driver that compiled it.
            driver = triton.runtime.driver.active
            driver.launched.append(program.kernel.name)
            driver.opcodes |= program.opcodes
            space, values = Space(), []
            for name, value in zip(names, args, strict=True):
                if isinstance(value, torch.Tensor):
                    pointer = value.untyped_storage().data_ptr()
                    value = space.add(name, value, pointer in driver.kept)
                if name in passed:
                    values.append(value)
            # Pointers to scratch memory, which these kernels have not.
            values += [0] * (len(program.kernel.params) - len(values))
            program.launch((x, y, z), values, space)

        return launch


def _without_machine_code(*stage):
    """Triton's hook into its compiler: the last stage hands on the PTX that it gets.

    What is compiled so has a place of its own in Triton's cache.
    """
    if not stage:
        return "emulated", "emulated"
    _, stages, *_ = stage
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextlib.contextmanager
def emulated(arch, kept=()):
    """Run the project's Triton backend on tensors of the CPU, as if there were a GPU.

    Memory that nobody has written is NaN, or the largest integer.

    Args:
        arch: compute capability, 80 or 90. kept: tensors whose memory no kernel may write to.
    Yields:
        `EmulatingDriver`.
    """
    driver = EmulatingDriver(arch, kept)
    deterministic = torch.are_deterministic_algorithms_enabled()
    patches = (
        (triton.runtime.driver, "_active", driver),
        (triton.knobs.runtime, "add_stages_inspection_hook", _without_machine_code),
        (available, "why_not", lambda device=None: None),
        (available, "device_of", lambda device: DEVICES[arch]),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        torch.use_deterministic_algorithms(True)
        try:
            yield driver
        finally:
            torch.use_deterministic_algorithms(deterministic)
