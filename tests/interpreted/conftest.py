"""These tests run kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreted.

The variable must be set before Triton is imported; without it nothing here is collected.
"""

import os
import warnings

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    # Before anything asks the library whether bfloat16 works: it remembers the answer.
    interpreter.install()
    from moram_kernels.triton_backend import launcher

    assert launcher.interprets_bfloat16()
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Infinity and NaN are inputs here; kernels do not warn of them, numpy would."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def no_tf32_products():
    """No kernel may round float32 operands to tf32, which Triton does by default."""
    interpreter.products.clear()
    yield
    assert not interpreter.products["tf32"], "a tl.dot lacks its input_precision"
