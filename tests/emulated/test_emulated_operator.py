"""The operator's compiled kernels, executed: no fault, and numbers within the budget of the oracle.

Every case runs `retrieve(backend="triton")`, forward and backward, through Triton's real compiler
for sm_80 and sm_90. No tensor of a case may be written to. `make test` runs a cross-section, and
`make emulate` every case.
"""

from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from emulated_driver import emulated
from paths import ALL, TRAINED, call, check_call, run_training
from support import LEAVES, far_rows, laid_out, make_case, with_spare_rows

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ARCHS = (80, 90)
ATOMS = ("keys", "values", "current_keys", "current_values")
TENSORS = (*LEAVES, "keys", "values", "grad")
# Rows, frozen and current atoms, features, outputs. None fills its tiles. Rows of a multiple of 16
# numbers are what kernels copy asynchronously.
SIZES = {
    "resident": (67, 41, 7, 64, 96),
    "split-dense": (37, 33, 7, 144, 80),
    "split-gather": (21, 151, 7, 144, 80),
    "decode": (5, 77, 9, 336, 112),
}


def a_case(path, **settings):
    names = ("rows", "frozen", "current", "width", "out")
    sizes = dict(zip(names, SIZES[path], strict=True))
    sizes |= {name: settings.pop(name) for name in names if name in settings}
    settings = {"top_k": 4, "temperature": 0.1, "threshold": 0.1, "dtype": BF16} | settings
    settings.setdefault("training", path != "decode")
    rows, *others = sizes.values()
    return make_case(0, (rows,), *others, **settings)


def changed(case, change, names=TENSORS):
    tensors = {name: getattr(case, name) for name in names}
    return replace(case, **{n: None if t is None else change(t) for n, t in tensors.items()})


def odd_view(tensor):
    """The same numbers at an odd offset, in rows that are an odd distance apart."""
    rows, columns = tensor.shape
    buffer = tensor.new_full((1 + rows * (columns + 3),), float("nan"))
    return buffer.as_strided((rows, columns), (columns + 3, 1), 1).copy_(tensor)


def one_buffer(case):
    """The current rows right behind the frozen ones, as a bank keeps them."""
    joined = {}
    for name in ("keys", "values"):
        frozen, current = getattr(case, name), getattr(case, f"current_{name}")
        table = torch.cat([frozen, current])
        joined |= {name: table[: len(frozen)], f"current_{name}": table[len(frozen) :]}
    return replace(case, **joined)


def with_ties(path):
    """Small integers, and every key four times: scores are exact, and tie at most borders."""
    case = a_case(path, integers=True)

    def repeated(keys):
        return keys[torch.arange(len(keys)) // 4 * 4]

    return changed(case, repeated, ("keys", "current_keys"))


# What differs from the ordinary case of a path.
CASES = {
    "bf16": a_case,
    "f16": lambda path: a_case(path, dtype=F16),
    "f32": lambda path: a_case(path, dtype=F32),
    "bf16x6": lambda path: a_case(path, dtype=F32),
    "f32 atoms": lambda path: changed(a_case(path), torch.Tensor.float, ATOMS),
    "f32 inputs": lambda path: changed(a_case(path), torch.Tensor.float, ("x", "residual", "grad")),
    "f32 residual": lambda path: changed(a_case(path), torch.Tensor.float, ("residual", "grad")),
    "f16 with f32 atoms": lambda path: changed(a_case(path, dtype=F16), torch.Tensor.float, ATOMS),
    "ties": with_ties,
    "odd views": lambda path: changed(a_case(path), odd_view),
    "odd f32 views": lambda path: changed(a_case(path, dtype=F32), odd_view),
    "transposed": lambda path: changed(a_case(path), lambda t: laid_out(t, "transposed")),
    "strided": lambda path: changed(a_case(path), lambda t: laid_out(t, "strided")),
    "far rows": lambda path: changed(a_case(path, rows=20, frozen=18, current=6), far_rows),
    "one buffer": lambda path: one_buffer(a_case(path)),
    "spare rows": lambda path: with_spare_rows(a_case(path), 6),
    "inference": lambda path: a_case(path, training=False),
    "all atoms": lambda path: a_case(path, frozen=20, top_k=64),
    "top 8": lambda path: a_case(path, top_k=8),
    "one row": lambda path: a_case(path, rows=1),
    "one atom": lambda path: a_case(path, frozen=0, current=1, top_k=1),
    "no frozen atoms": lambda path: a_case(path, frozen=0, current=24),
    "no current atoms": lambda path: a_case(path, current=0),
    "no residual": lambda path: a_case(path, residual=False),
    "whole tiles": lambda path: a_case(path, rows=64, frozen=56, current=8, width=128, out=128),
}
# Whose sizes are those of one path.
SIZED = {
    "resident": {
        "two tiles": {"frozen": 80, "current": 12, "top_k": 8},
        "128 atoms": {"frozen": 110, "current": 12, "top_k": 16},
        "two f16 tiles": {"frozen": 80, "current": 12, "dtype": F16},
    },
    "split-dense": {
        "odd sizes": {"width": 77, "out": 53},
        "odd f32 sizes": {"width": 77, "out": 53, "dtype": F32},
        "many tiles": {"rows": 130, "frozen": 300, "current": 20, "width": 256, "out": 192},
        "1000 atoms": {"rows": 20, "frozen": 1000, "top_k": 16},
    },
    "split-gather": {
        "odd sizes": {"width": 77, "out": 53},
        "odd f16 sizes": {"width": 77, "out": 53, "dtype": F16},
        "groups": {"rows": 5, "frozen": 8300, "width": 61, "out": 51},
        "groups without current atoms": {"rows": 5, "frozen": 8300, "current": 0, "width": 61},
    },
    "decode": {
        "odd sizes": {"width": 333, "out": 101},
        "many features": {"frozen": 100, "width": 512},
    },
}
# (case, path, architectures) of `make test`. Compiling is what takes time, so that what another
# case has compiled already is for both.
CROSS_SECTION = {
    ("bf16", "resident"): ARCHS,
    ("bf16", "split-dense"): ARCHS,
    ("bf16", "split-gather"): ARCHS,
    ("bf16", "decode"): ARCHS,
    ("ties", "resident"): ARCHS,
    ("ties", "split-dense"): ARCHS,
    ("ties", "split-gather"): ARCHS,
    ("ties", "decode"): ARCHS,
    ("f32", "split-gather"): (80,),
    ("f16", "split-dense"): (90,),
    ("f32 atoms", "split-dense"): (80,),
    ("f16 with f32 atoms", "decode"): (80,),
    ("odd sizes", "split-gather"): (80,),
    ("odd sizes", "split-dense"): (90,),
    ("odd views", "decode"): (80,),
    ("strided", "decode"): (90,),
}


def every(pairs):
    """(case, path, architecture) of pairs of the first two, marked unless in the cross-section."""
    chosen = []
    for pair in pairs:
        for arch in ARCHS:
            quick = arch in CROSS_SECTION.get(pair, ())
            marks, name = () if quick else pytest.mark.emulate, "-".join(pair)
            chosen.append(pytest.param(*pair, arch, marks=marks, id=f"{name}-sm_{arch}"))
    return chosen


@contextmanager
def emulating(arch, case, **how):
    """Within the block launches are emulated, and no tensor of the case may be written to."""
    tensors = [getattr(case, field.name) for field in fields(case)]
    with emulated(arch, [t for t in tensors if isinstance(t, torch.Tensor)], **how) as driver:
        yield driver


@pytest.mark.parametrize(("name", "path", "arch"), every(product(CASES, ALL)))
def test_compiled_kernels_have_no_fault_and_agree_with_the_oracle(name, path, arch):
    case = CASES[name](path)
    precision = "bf16x6" if name == "bf16x6" else "ieee"
    with emulating(arch, case) as driver:
        check_call(case, path, precision=precision, exact=name == "ties")
    assert driver.launched


@pytest.mark.parametrize(
    ("name", "path", "arch"), every([(name, path) for path in SIZED for name in SIZED[path]])
)
def test_other_sizes_have_no_fault_and_agree_with_the_oracle(name, path, arch):
    case = a_case(path, **SIZED[path][name])
    with emulating(arch, case):
        check_call(case, path)


def numbers(case, path):
    return run_training(case, path)[0] if path in TRAINED else {"output": call(case, path)}


@pytest.mark.emulate
@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("arch", ARCHS)
def test_row_that_is_not_finite_stays_in_its_row(path, arch):
    case = a_case(path, rows=9)
    x = case.x.clone()
    x[1], x[3, 5], x[5, 7] = 0, float("inf"), float("nan")
    case = replace(case, x=x)
    bad = replace(case, x=x.clone())
    clean = replace(case, x=torch.where(x.isfinite(), x, 0))
    with emulating(arch, case):
        found, expected = numbers(bad, path), numbers(clean, path)
    others = [0, 1, 2, 4, 6, 7, 8]
    for name in {"output", "x"} & found.keys():
        assert torch.equal(found[name][others], expected[name][others]), name
        assert not found[name][[3, 5]].isfinite().any(), name


def test_instructions_of_tensor_cores_and_asynchronous_copies_are_among_those_executed():
    case = a_case("split-dense")
    for arch, opcodes in ((80, {"mma", "ldmatrix"}), (90, {"wgmma", "fence"})):
        with emulating(arch, case) as driver:
            call(case, "split-dense")
        assert driver.opcodes >= opcodes | {"cp", "shfl", "bar"}, arch
