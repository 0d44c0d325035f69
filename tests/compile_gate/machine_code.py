"""Compiles a recorded launch for a GPU that is not here, and reads what the machine code costs.

Compilation goes through Triton's own binder, so that integers and pointers are specialised as a
real launch specialises them. NVIDIA's code is read with the cuobjdump that ships with Triton, AMD's
from its assembly. No threshold lives here.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Opcodes of SASS by what they are counted as.
_COUNTED = {
    "hmma": r"HMMA",
    "hgmma": r"HGMMA",
    "tcgen05": r"UTC\w*MMA",
    "local": r"LDL|STL",
    "copies": r"LDGSTS|UBLKCP|UTMALDG",
    "barriers": r"BAR",
    "shuffles": r"SHFL",
}


def compile_launch(launch, target):
    """The compiled kernel of a `configurations.Launch` for a target's name."""
    backend = make_backend(TARGETS[target])
    kernel, meta = launch.kernel, launch.meta
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **meta)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def read(compiled, target):
    """What a compiled kernel costs, as a dict of integers.

    registers, stack (bytes a thread), shared (bytes), local (local-memory instructions; spilled
    registers on AMD), instructions, mma (tensor-core ones), copies (asynchronous ones), barriers,
    shuffles and, in the compiler's intermediate code, conversions (of a tile's layout),
    async_copies (tiles copied asynchronously) and narrow_offsets (32-bit products with a stride).
    For wgmma also serialised: whether the assembler let no products of warp groups overlap.
    """
    middle = compiled.asm["ttgir"]
    facts = _read_amd(compiled) if target.startswith("gfx") else _read_nvidia(compiled)
    facts["shared"] = compiled.metadata.shared
    facts["conversions"] = middle.count("ttg.convert_layout")
    facts["async_copies"] = middle.count("ttg.async_copy_global_to_local")
    if "wgmma" in compiled.asm.get("ptx", ""):
        facts["serialised"] = serialised(assembler_log(compiled, target))
    facts["narrow_offsets"] = _narrow_offsets(compiled.asm["ttir"])
    return facts


def assembler_log(compiled, target):
    """What ptxas says of a compiled kernel, called once more as Triton calls it."""
    backend = make_backend(TARGETS[target])
    options = backend.parse_options(compiled.metadata._asdict())
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, options, TARGETS[target].arch)
    return log.getvalue()


def serialised(log):
    """How many kernels ptxas says it gave wgmma products that wait for each other."""
    return len(re.findall(r"\(C7515\)", log))


def _narrow_offsets(code):
    strides = set(re.findall(r"(%stride\w*): i32", code))
    splats = re.findall(r"(%\w+) = tt\.splat (%\w+) ", code)
    strides |= {name for name, source in splats if source in strides}
    factors = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:i32|tensor<\S+xi32>)", code)
    return sum(not strides.isdisjoint(pair) for pair in factors)


def _read_nvidia(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # An instruction's line: its address in a comment, an optional predicate, the opcode.
    codes = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    counts = {
        name: sum(1 for code in codes if re.match(pattern, code))
        for name, pattern in _COUNTED.items()
    }
    return {
        "registers": registers,
        "stack": stack,
        "instructions": len(codes),
        "mma": counts["hmma"] + counts["hgmma"] + counts["tcgen05"],
        **counts,
    }


def _read_amd(compiled):
    text = compiled.asm["amdgcn"]

    def number(key):
        return int(re.search(rf"\.{key}:?\s+(\d+)", text).group(1))

    codes = re.findall(r"^\t([a-z][a-z]*_\w+)", text, re.MULTILINE)
    return {
        # Accumulation registers are counted among the vector registers.
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": number("vgpr_spill_count"),
        "instructions": len(codes),
        "mma": sum(1 for code in codes if code.startswith("v_mfma")),
        "barriers": sum(1 for code in codes if code == "s_barrier"),
    }


def _cuobjdump(*args):
    run = subprocess.run([_CUOBJDUMP, *args], capture_output=True, text=True, check=True)
    return run.stdout
