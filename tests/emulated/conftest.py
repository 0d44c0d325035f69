"""These tests execute compiled kernels on the CPU: no GPU, and not Triton's interpreter.

They share the oracle and the forced paths of the interpreted tests. The emulator, in reading order:
`emulated_driver` stands for the GPU's driver; `ptx_text` parses; `ptx_translate` makes Python of it
with what opcodes mean in `ptx_arithmetic`, `ptx_access` and `ptx_numbers`; `machine` runs that on
`threads`, with `global_memory` in an `address_space`, `shared_memory`, `async_copies`, `warps`,
`matrices` and `warpgroup_products`. `ptx_flow` finds registers that may be read unwritten.

Beside the tests: `shipped_tiles` turns the compile gate's calls into small ones, `mutations` breaks
kernels, `count_kernels` counts what they execute, with `counts`.
"""

import os
import sys

from support import ROOT

if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton compiles nothing then.
    collect_ignore_glob = ["*"]
sys.path.extend(str(ROOT / "tests" / name) for name in ("interpreted", "compile_gate"))
