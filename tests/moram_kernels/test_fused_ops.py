"""The fused ops where no kernel can run: on the CPU they are the torch backend."""

import os
import subprocess
import sys

import pytest
import torch
from fused_cases import (
    FORMS,
    OP_CASES,
    assert_same_bits,
    backward_arguments,
    bank_with,
    case_named,
    op_arguments,
)
from support import ROOT, run, take_large_routes

from moram_kernels import retrieve


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("form", FORMS)
def test_the_forward_is_the_torch_backend(form, name, save, monkeypatch):
    take_large_routes(monkeypatch)
    case = case_named(name, form)
    output, *_ = torch.ops.moram.retrieve_fused(*op_arguments(case, save))
    assert torch.equal(output, run(case, "torch", wanted=())["output"])


@pytest.mark.parametrize("name", [n for n in OP_CASES if n != "no atoms"])
@pytest.mark.parametrize("form", FORMS)
def test_the_backward_is_the_torch_backend(form, name, monkeypatch):
    # Bit for bit, hence by one route: small problems leave their backward to autograd.
    take_large_routes(monkeypatch)
    case = case_named(name, form)
    names = ("x", "current_keys", "current_values")
    grads = torch.ops.moram.retrieve_fused_backward(*backward_arguments(case))
    expected = run(case, "torch", [n for n in names if getattr(case, n) is not None])
    expected.pop("output")
    actual = dict(zip(names, grads, strict=True))
    assert_same_bits({n: actual[n] for n in expected}, expected)


def test_without_live_atoms_there_is_no_gradient():
    arguments = backward_arguments(case_named("no atoms", "dense"))
    assert not any(grad.any() for grad in torch.ops.moram.retrieve_fused_backward(*arguments))


@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_on_the_cpu(form, name):
    case = case_named(name, form)
    forward, backward = torch.ops.moram.retrieve_fused, torch.ops.moram.retrieve_fused_backward
    for op, arguments in (
        (forward, op_arguments(case)),
        (forward, op_arguments(case, save=False)),
        (backward, backward_arguments(case)),
    ):
        outcome = torch.library.opcheck(op.default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_triton_by_name_is_refused_with_a_remedy_for_every_call():
    case = bank_with("dense", 11)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        other = case.to(dtype)
        with pytest.raises(RuntimeError) as caught:
            retrieve(other.x, other.keys, other.values, other.activation, backend="triton")
        message = str(caught.value)
        assert message.startswith('backend="triton" cannot run: '), message
        assert 'backend="torch"' in message, message


def test_a_call_on_the_cpu_never_imports_triton():
    code = (
        "import sys, torch, moram_kernels\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "rule = moram_kernels.SelfActivation()\n"
        "moram_kernels.retrieve(x, x[:1], x[:1], rule).sum().backward()\n"
        "moram_kernels.retrieve(x, x[:1], x[:1], rule, backend='reference')\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    )
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"
