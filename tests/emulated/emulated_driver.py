"""A CUDA driver that is none: Triton binds, specialises and compiles; the emulator launches.

    with emulated(80, "resident") as driver:
        retrieve(x, keys, values, activation, backend="triton")  # tensors of the CPU

Only this module knows the project's kernels.
"""

import contextlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Launched:
    """A launch that was made. constants: by name, with warps and stages. dtypes: of its tensors."""

    name: str
    constants: dict
    dtypes: frozenset

    @classmethod
    def of(cls, source, metadata):
        """What a compiled kernel's launches are, from what Triton's launcher gets."""
        names = list(source.signature)
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        for name in ("num_warps", "num_stages", "maxnreg"):
            constants[name] = getattr(metadata, name)
        kinds = frozenset(kind[1:] for kind in source.signature.values() if kind[0] == "*")
        return cls(source.name, constants, kinds)


class EmulatingDriver:
    """What Triton's runtime asks of a driver.

    Args:
        arch: compute capability, 80 or 90. kept: tensors whose memory no kernel may write to.
    """

    def __init__(self, arch, kept=()):
        self.arch = arch
        self.kept = {tensor.untyped_storage().data_ptr() for tensor in kept}
        # `Launched` of all launches, in order, and all opcodes that the kernels have.
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
        launched = Launched.of(source, metadata)

        def launch(x, y, z, stream, program, packed, about, enter, leave, *args):
            # The compiled kernel outlives the driver that compiled it.
            driver = triton.runtime.driver.active
            driver.launched.append(launched)
            driver.opcodes |= program.opcodes
            given = zip(names, args, strict=True)
            driver.run(program, (x, y, z), [(name, value, name in passed) for name, value in given])

        return launch

    def counts_of(self, program):
        """`Counts` that a launch adds to, or None."""
        return None

    def run(self, program, grid, arguments):
        """Emulate a launch.

        Args:
            arguments: (name, value, whether the kernel gets it) of each.
        """
        space, values = Space(), []
        for name, value, passed in arguments:
            if isinstance(value, torch.Tensor):
                pointer = value.untyped_storage().data_ptr()
                value = space.add(name, value, pointer in self.kept)
            if passed:
                values.append(value)
        # Pointers to scratch memory, which these kernels have not.
        values += [0] * (len(program.kernel.params) - len(values))
        program.launch(grid, values, space, self.counts_of(program))


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
def emulated(arch, kept=(), kind=EmulatingDriver):
    """Run the project's Triton backend on tensors of the CPU, as if there were a GPU.

    Memory that nobody has written is NaN, or the largest integer.

    Args:
        arch: compute capability, 80 or 90. kept: tensors whose memory no kernel may write to.
        kind: class of the driver.
    Yields:
        `EmulatingDriver`.
    """
    driver = kind(arch, kept)
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
