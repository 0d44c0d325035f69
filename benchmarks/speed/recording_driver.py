"""A CUDA driver that launches nothing: Triton binds, specialises and compiles; launches are noted.

Within `recorded()` the Triton backend runs on tensors of the CPU as if there were an H100.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from moram_kernels.triton_backend import available
from moram_kernels.triton_backend.devices import A100, H100

# Limits of a CUDA grid, per dimension.
GRID = (2**31 - 1, 65535, 65535)
DEVICES = {80: A100, 90: H100}


class Function(str):
    """A kernel's name, with the machine code and the device that it was loaded for."""

    __slots__ = ("binary", "device")

    def __new__(cls, name, binary, shared, device):
        function = super().__new__(cls, name)
        function.binary, function.device = binary, device
        return function


class RecordingDriver:
    """Stands in for the CUDA driver: knows an H100, loads nothing, records launches.

    `launched` has the name of every kernel, in order; `arguments` what each was launched with:
    (grid, stream, arguments). With keep=False neither is noted.
    """

    def __init__(self, arch=90, keep=True):
        self.arch, self.stream, self.device = arch, 0, 0
        self.launched, self.arguments = [], []
        self.keep = keep
        device = DEVICES[arch]
        properties = {"max_shared_mem": device.shared, "multiprocessor_count": device.units}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # A module that is there, so that it is loaded once; 64 registers, no spills.
            load_binary=lambda *args: (True, Function(*args), 64, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        """What Triton compiles for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        """The number of the device that launches go to."""
        return self.device

    def get_current_stream(self, device):
        """The handle of the stream that launches go to."""
        return self.stream

    def launcher_cls(self, source, metadata):
        """A compiled kernel's launcher, which notes the launch."""

        def record(x, y, z, stream, function, packed, about, enter, leave, *args):
            # The compiled kernel outlives the driver that compiled it.
            driver = triton.runtime.driver.active
            if driver.keep:
                assert all(0 < size <= limit for size, limit in zip((x, y, z), GRID, strict=True))
                driver.launched.append(function)
                driver.arguments.append(((x, y, z), stream, args))

        return record


@contextlib.contextmanager
def recorded(driver=None):
    """Run the Triton backend on tensors of the CPU as if there were an H100.

    Args:
        driver: a `RecordingDriver`, a new one by default.
    Yields:
        the driver.
    """
    driver = RecordingDriver() if driver is None else driver
    patches = (
        (triton.runtime.driver, "_active", driver),
        (available, "why_not", lambda device=None: None),
        (available, "device_of", lambda device: DEVICES[driver.arch]),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield driver
