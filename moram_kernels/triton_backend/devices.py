"""What is known of a GPU: which tiles compile for it, what they must fit into, how fast it is.

One `Device` is shared by plan, cost model, tiles and `explain`. A GPU that torch sees is described
by its capability and properties. One that is not here has a name, and its maker's figures. Imports
no Triton and asks no GPU.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

KIB = 1024
# AMD's GPUs whose matrix cores the kernels are compiled for.
MATRIX_CORES = ("gfx90a", "gfx942", "gfx950")
# NVIDIA's targets by the least compute capability that takes their tiles. 8.6, 8.7 and 8.9 hold
# fewer warps than 8.0; 10.3 and 11.0 are like 10.0, 12.1 is like 12.0. What is newer than all takes
# the tiles that need least.
TARGETS = ((120, "sm_120"), (100, "sm_100"), (90, "sm_90"), (81, "sm_89"), (80, "sm_80"))
# Part of L2 that stays for operands which are read again.
L2_SHARE = 0.75


@dataclass(frozen=True, eq=False)
class Device:
    """A GPU. Two of them are equal only if they are one object, so that a look-up is cheap.

    name: as torch or a person calls it. arch: compute capability (90 for 9.0) or AMD's "gfx...".
    units: multiprocessors. shared: bytes of shared memory that one program can have.
    memory, cache: peak bytes/s of device memory and L2. half, single: peak FLOP/s of products in 16
    bit and in float32. clock: Hz that are kept up. cache_bytes: of L2, for what is read again.
    """

    name: str
    arch: int | str
    units: int
    shared: int
    memory: float
    cache: float
    half: float
    single: float
    clock: float
    cache_bytes: float

    @property
    def issue(self) -> float:
        """Warp instructions a second."""
        return 4 * self.units * self.clock

    @property
    def target(self) -> str | None:
        """`target_of` its capability."""
        return target_of(self.arch)

    @property
    def why_not(self) -> str | None:
        """Why kernels do not run on it, one sentence with the remedy, or None."""
        if self.target:
            return None
        if isinstance(self.arch, str):
            needed, got = f"matrix cores of {', '.join(MATRIX_CORES)}", self.arch
        else:
            needed, got = "compute capability 8.0 or higher", f"{self.arch // 10}.{self.arch % 10}"
        return (
            f"the kernels need {needed}, got {got} ({self.name}), where they spill registers; use "
            'backend="torch", which "auto" takes there'
        )


def target_of(arch: int | str) -> str | None:
    """The target whose tiles a capability takes, one of those of `tests/compile_gate`, or None."""
    if isinstance(arch, str):
        return "gfx942" if arch in MATRIX_CORES else None
    return next((target for first, target in TARGETS if arch >= first), None)


H100 = Device("H100", 90, 132, 227 * KIB, 3.35e12, 5.5e12, 989e12, 67e12, 1.7e9, 40e6)
A100 = Device("A100", 80, 108, 163 * KIB, 2.0e12, 4.0e12, 312e12, 19.5e12, 1.4e9, 30e6)
B200 = Device("B200", 100, 148, 227 * KIB, 8.0e12, 10e12, 2250e12, 80e12, 1.8e9, 100e6)
MI300 = Device("MI300", "gfx942", 304, 64 * KIB, 5.3e12, 8.0e12, 1307e12, 163e12, 2.1e9, 200e6)
# L2 of the next four: 5e12 on an RTX 4090 by published measurements, and as much a unit. GeForce
# cards multiply at half the rate of their siblings, which no property tells.
L40S = Device("L40S", 89, 142, 99 * KIB, 0.864e12, 5.5e12, 362e12, 91.6e12, 2.2e9, 72e6)
PRO_6000 = Device("RTX PRO 6000", 120, 188, 99 * KIB, 1.79e12, 7.3e12, 504e12, 125e12, 2.2e9, 96e6)
DEVICES = (
    B200,
    replace(H100, name="H200", memory=4.8e12),
    H100,
    A100,
    MI300,
    L40S,
    Device("RTX 4090", 89, 128, 99 * KIB, 1.01e12, 5.0e12, 165e12, 82.6e12, 2.2e9, 54e6),
    PRO_6000,
    Device("RTX 5090", 120, 170, 99 * KIB, 1.79e12, 6.6e12, 210e12, 105e12, 2.2e9, 72e6),
)
# What the interpreter is planned as.
INTERPRETER = replace(H100, name="interpreter")
# By target the card whose rates a unit has, and the clock in Hz that torch reports of it.
REFERENCES = {
    "sm_80": (A100, 1.41e9),
    "sm_89": (L40S, 2.52e9),
    "sm_90": (H100, 1.98e9),
    "sm_100": (B200, 1.965e9),
    "sm_120": (PRO_6000, 2.6e9),
    "gfx942": (MI300, 2.1e9),
}


def of_properties(arch: int | str, properties: Any) -> Device:
    """The device of which torch gives these properties.

    What properties do not tell is that of the target's reference card, per multiprocessor.

    Args:
        arch: as in `Device`. properties: as from `torch.cuda.get_device_properties`.
    """
    like, boost = REFERENCES[target_of(arch) or "sm_80"]

    def known(name: str) -> int:
        # Not every torch has every property; a driver may leave one 0.
        return getattr(properties, name, 0) or 0

    units = properties.multi_processor_count
    clock = known("clock_rate") * 1e3 / boost or 1.0
    speed = clock * units / like.units
    # kHz, two transfers a clock; AMD's counts them otherwise, and its L2 without the cache behind.
    memory = 2e3 * known("memory_clock_rate") * known("memory_bus_width") / 8
    cache_bytes = L2_SHARE * known("L2_cache_size")
    if isinstance(arch, str):
        memory = cache_bytes = 0.0
    return Device(
        properties.name,
        arch,
        units,
        known("shared_memory_per_block_optin") or like.shared,
        memory or like.memory * units / like.units,
        like.cache * speed,
        like.half * speed,
        like.single * speed,
        like.clock * clock,
        cache_bytes or like.cache_bytes,
    )


@functools.cache
def device_model(name: Device | str) -> Device:
    """The device of a name: a card of `DEVICES`, in words that may be longer, or a capability.

    Args:
        name: "H100", "NVIDIA H100 80GB HBM3", "sm_86", "gfx90a" or "interpreter"; or a `Device`,
            which is returned.
    Raises:
        ValueError: nothing is known under this name.
    """
    if isinstance(name, Device):
        return name
    if name == INTERPRETER.name:
        return INTERPRETER
    listed = next((device for device in DEVICES if device.name in name), None)
    if listed:
        return listed
    arch = name if name.startswith("gfx") else int(name[3:]) if _is_capability(name) else None
    if arch is None:
        raise ValueError(
            f"device must be one of {', '.join(device.name for device in DEVICES)}, a capability "
            f'such as "sm_86" or "gfx90a", or a torch device of this machine, got {name!r}'
        )
    return replace(REFERENCES[target_of(arch) or "sm_80"][0], name=name, arch=arch)


def _is_capability(name: str) -> bool:
    return name.startswith("sm_") and name[3:].isdigit()
