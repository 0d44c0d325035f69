"""These tests execute compiled kernels on the CPU: no GPU, no interpreter of Triton.

They share the oracle and the forced paths of the interpreted tests.
"""

import sys

from support import ROOT

sys.path.append(str(ROOT / "tests" / "interpreted"))
