"""The plan of mixed dtypes, and of banks in two segments that the library would multiply."""

import pytest
import torch

from moram_kernels import SelfActivation, explain
from moram_kernels.triton_backend.plan import dtype_name, plan, rate_of

CLIP = (12608, 768, 768, 160, 16)


@pytest.mark.parametrize(
    "dtypes, name, rate, precision",
    [
        ("float32", "float32", "single", "ieee"),
        ("bfloat16", "bfloat16", "half", "ieee"),
        ("bfloat16 float32", "bfloat16+float32", "three", "bf16x6"),
        ("bfloat16 bfloat16 float32", "bfloat16+float32", "three", "bf16x6"),
        ("float32 bfloat16 float32", "float32", "single", "ieee"),
        ("float16 float32", "float16+float32", "six", "bf16x6"),
        ("float16 bfloat16", "float16+float32", "six", "bf16x6"),
        ("float32 float16 bfloat16", "float32", "single", "ieee"),
    ],
)
def test_mixed_16_bit_inputs_use_tensor_cores_whatever_the_precision(dtypes, name, rate, precision):
    assert dtype_name(*(getattr(torch, dtype) for dtype in dtypes.split())) == name
    chosen = plan(*CLIP, name, training=True, current=16)
    assert (rate_of(name, "ieee"), chosen.precision) == (rate, precision)


MANY = (8192, 2048, 2048, 4096, 16)


@pytest.mark.parametrize(
    "change, copies",
    [
        ({}, True),
        ({"path": "split-dense"}, True),
        ({"training": False}, False),
        ({"joined": True}, False),
        ({"current": 0}, False),
        ({"current": 4096}, False),
        ({"dtype": "float32"}, False),
        ({"dtype": "bfloat16+float32"}, False),
        ({"path": "resident", "atoms": 64}, False),
        ({"path": "split-dense", "atoms": 64, "tokens": 512}, False),
    ],
    ids=str,
)
def test_two_segments_become_one_for_the_library_where_that_is_modelled_faster(change, copies):
    names = ("tokens", "width", "out", "atoms", "top_k")
    call = dict(zip(names, MANY, strict=True)) | {"training": True, "current": 64} | change
    chosen = plan(**call)
    assert chosen.copy is copies
    if copies:
        assert chosen.seconds[chosen.path] > plan(**call | {"joined": True}).seconds[chosen.path]


def test_a_mixed_layer_is_modelled_between_those_of_its_dtypes():
    for path in ("split-dense", "split-gather"):
        half, mixed, single = (
            plan(*CLIP, dtype, training=True, current=16).seconds[path]
            for dtype in ("bfloat16", "bfloat16+float32", "float32")
        )
        assert half < mixed < single, path


def test_explain_says_that_atoms_have_another_dtype(capsys):
    found = explain(*CLIP[:4], SelfActivation(top_k=16), atoms_dtype=torch.float32, device="H100")
    assert found == plan(*CLIP, "bfloat16+float32", joined=True)
    assert "torch.bfloat16 with atoms of torch.float32, inference" in capsys.readouterr().out
