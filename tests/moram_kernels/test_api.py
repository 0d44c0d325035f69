"""The public call: every refusal and what it says, the choice of a backend, a light import."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

import moram_kernels
from moram_kernels import SelfActivation, available_backends, retrieve, retrieve_linear

HEAVY = ("triton", "transformers", "open_clip", "peft", "torchvision", "matplotlib")


def arguments(**changes):
    """A valid call: x [2, 3, 4], five frozen and two current atoms, output [2, 3, 6]."""
    return {
        "x": torch.ones(2, 3, 4),
        "keys": torch.ones(5, 4),
        "values": torch.ones(5, 6),
        "activation": SelfActivation(),
        "current_keys": torch.ones(2, 4),
        "current_values": torch.ones(2, 6),
        "residual": torch.ones(2, 3, 6),
        **changes,
    }


def assert_refused(error, message, **changes):
    with pytest.raises(error) as caught:
        retrieve(**arguments(**changes))
    assert str(caught.value) == message


def test_the_valid_call_runs():
    output = retrieve(**arguments())
    # Seven equal atoms: z = 1/sqrt(7) = 0.38 passes 0.2; 1 + 4 * (weights that sum to 1).
    torch.testing.assert_close(output, torch.full((2, 3, 6), 5.0))


TENSORS = ["x", "keys", "values", "current_keys", "current_values", "residual"]


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_must_be_tensors(name):
    assert_refused(TypeError, f"{name} must be a tensor, got list", **{name: [1.0]})


@pytest.mark.parametrize("name", ["x", "keys", "values"])
@pytest.mark.parametrize("others", [None, "given"], ids=["alone", "with-current"])
def test_what_is_always_needed_must_not_be_none(name, others):
    changes = {} if others else {"current_keys": None, "current_values": None}
    assert_refused(TypeError, f"{name} must be a tensor, got NoneType", **changes, **{name: None})


@pytest.mark.parametrize("name", ["keys", "values", "current_keys", "current_values"])
def test_onto_a_linear_tensors_must_be_tensors_too(name):
    call = arguments() | {name: [1.0]}
    del call["residual"]
    weight = torch.zeros(arguments()["values"].shape[1], call["x"].shape[-1])
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        retrieve_linear(weight=weight, bias=None, **call)


@pytest.mark.parametrize("name", ["current_keys", "current_values"])
def test_current_keys_and_values_come_together(name):
    message = (
        f"{name} must be a tensor, got NoneType; "
        "give both current_keys and current_values or neither"
    )
    assert_refused(TypeError, message, **{name: None})


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_tensors_must_be_floating(name, dtype):
    message = f"{name} must be a floating-point tensor, got {dtype}"
    assert_refused(TypeError, message, **{name: arguments()[name].to(dtype)})


@pytest.mark.parametrize("name", TENSORS[1:])
def test_tensors_must_share_the_device_of_x(name):
    message = f"{name} must be on the device of x, cpu, got meta"
    assert_refused(ValueError, message, **{name: arguments()[name].to("meta")})


@pytest.mark.parametrize("value", [None, 8, {"top_k": 8}, SelfActivation], ids=str)
def test_activation_must_be_a_self_activation(value):
    message = f"activation must be a SelfActivation, got {type(value).__name__}"
    assert_refused(TypeError, message, activation=value)


def test_x_must_have_a_dimension():
    assert_refused(ValueError, "x must be [..., D], got ()", x=torch.tensor(1.0), residual=None)


@pytest.mark.parametrize("current", [True, False], ids=["with-current", "alone"])
@pytest.mark.parametrize("shape", [(), (4,), (5, 3), (5, 4, 1)], ids=str)
def test_keys_must_match_x(shape, current):
    changes = {} if current else {"current_keys": None, "current_values": None}
    message = f"keys must be [F, 4] to match x, got {shape}"
    assert_refused(ValueError, message, keys=torch.ones(shape), **changes)


@pytest.mark.parametrize("current", [True, False], ids=["with-current", "alone"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (5, 6, 1)], ids=str)
def test_values_must_match_keys(shape, current):
    changes = {} if current else {"current_keys": None, "current_values": None}
    message = f"values must be [5, O], one row per key, got {shape}"
    assert_refused(ValueError, message, values=torch.ones(shape), **changes)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 4, 1)], ids=str)
def test_current_keys_must_match_x(shape):
    message = f"current_keys must be [C, 4] to match x, got {shape}"
    assert_refused(ValueError, message, current_keys=torch.ones(shape))


@pytest.mark.parametrize("shape", [(), (6,), (3, 6), (2, 5), (2, 6, 1)], ids=str)
def test_current_values_must_match_both(shape):
    message = f"current_values must be (2, 6) to match current_keys and values, got {shape}"
    assert_refused(ValueError, message, current_values=torch.ones(shape))


@pytest.mark.parametrize("name", ["values", "current_keys", "current_values"])
def test_the_bank_has_one_dtype(name):
    message = f"{name} must have the dtype of keys, torch.float32, got torch.float64"
    assert_refused(ValueError, message, **{name: arguments()[name].double()})


@pytest.mark.parametrize("shape", [(), (6,), (6, 6), (2, 3, 5), (3, 2, 6), (1, 1, 6)], ids=str)
def test_residual_must_have_the_shape_of_the_output(shape):
    message = f"residual must be (2, 3, 6), x's leading shape and O, got {shape}"
    assert_refused(ValueError, message, residual=torch.ones(shape))


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3.0), torch.tensor(3, dtype=torch.int32)])
def test_num_frozen_must_be_an_int64_tensor(value):
    message = f"num_frozen must be an int64 CPU tensor, got {value!r}"
    assert_refused(TypeError, message, num_frozen=value)


@pytest.mark.parametrize("shape, device", [((1,), "cpu"), ((), "meta")], ids=str)
def test_num_frozen_must_be_a_scalar_on_the_cpu(shape, device):
    message = f"num_frozen must be a CPU tensor without dimensions, got {shape} on {device}"
    value = torch.ones(shape, dtype=torch.int64, device=device)
    assert_refused(ValueError, message, num_frozen=value)


@pytest.mark.parametrize("value", [-1, 6])
def test_num_frozen_must_be_in_the_bank(value):
    message = f"num_frozen must be in [0, 5], the rows of keys, got {value}"
    assert_refused(ValueError, message, num_frozen=torch.tensor(value))


def test_a_bank_without_atoms_is_refused():
    message = "keys and current_keys hold no atom; at least one is needed"
    none = {"keys": torch.empty(0, 4), "values": torch.empty(0, 6)}
    assert_refused(ValueError, message, **none, current_keys=None, current_values=None)


@pytest.mark.parametrize("value", ["cuda", "Torch", "", None])
def test_an_unknown_backend_is_refused(value):
    message = f"backend must be one of auto, reference, torch, triton, got {value!r}"
    assert_refused(ValueError, message, backend=value)


def test_triton_is_refused_where_it_cannot_run():
    message = r'^backend="triton" cannot run: .*GPU.*backend="torch".*TRITON_INTERPRET=1'
    if "triton" not in available_backends():
        with pytest.raises(RuntimeError, match=message):
            retrieve(**arguments(x=torch.ones(2, 3, 4), backend="triton"))


def test_available_backends_are_those_that_run():
    names = available_backends()
    assert names[:2] == ("reference", "torch") and "auto" not in names
    for name in names:
        assert retrieve(**arguments(backend=name)).shape == (2, 3, 6)
    for name in {"reference", "torch", "triton"} - set(names):
        with pytest.raises(RuntimeError, match=f'backend="{name}" cannot run'):
            retrieve(**arguments(backend=name))


def test_auto_takes_the_torch_backend_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator)
    chosen = retrieve(**arguments(x=x))
    assert torch.equal(chosen, retrieve(**arguments(x=x, backend="torch")))
    assert torch.equal(chosen, retrieve(**arguments(x=x, backend="auto")))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_and_dtype_are_kept(lead, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(*lead, 4, dtype=dtype)
        output = retrieve(**arguments(x=x, residual=None, backend=backend))
        assert output.shape == (*lead, 6) and output.dtype == dtype


def test_settings_after_activation_are_named():
    call = arguments()
    with pytest.raises(TypeError, match="positional"):
        retrieve(*(call[n] for n in ("x", "keys", "values", "activation", "current_keys")))


def test_public_names():
    public = ["SelfActivation", "available_backends", "explain", "retrieve", "retrieve_linear"]
    assert sorted(moram_kernels.__all__) == public
    assert all(hasattr(moram_kernels, name) for name in moram_kernels.__all__)


def modules_after(statement):
    """The heavy packages that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_import_is_light():
    assert "matplotlib" in modules_after("sys.modules['matplotlib'] = sys")
    # What torch itself brings is torch's affair.
    assert modules_after("import moram_kernels") <= modules_after("import torch")
