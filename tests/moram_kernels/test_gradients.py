"""What the backward gives, to whom, and how little it keeps for it. Parity is in test_parity.py."""

from dataclasses import replace

import pytest
import torch
from plain import plain_update
from support import keep_separated, make_case, take_large_routes

from moram_kernels import retrieve, torch_backend

BACKENDS = ["reference", "torch"]
REFUSED = r"once_differentiable|second derivative"


def call(case, backend, **changes):
    tensors = {
        "x": case.x,
        "keys": case.keys,
        "values": case.values,
        "current_keys": case.current_keys,
        "current_values": case.current_values,
        "residual": case.residual,
        **changes,
    }
    return retrieve(**tensors, activation=case.activation, training=case.training, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_atoms_get_no_gradient(route, backend):
    case = make_case(0, (30,), 60, 4, 6, 5)
    keys, values = case.keys.requires_grad_(), case.values.requires_grad_()
    x = case.x.requires_grad_()
    call(case, backend, x=x, keys=keys, values=values).sum().backward()
    assert x.grad is not None and keys.grad is None and values.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_of_frozen_atoms_alone_gives_no_graph(backend, route):
    case = make_case(0, (200,), 60, 0, 6, 5, residual=False)
    keys, values = case.keys.requires_grad_(), case.values.requires_grad_()
    assert not call(case, backend, keys=keys, values=values).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_gradient_equals_the_output_gradient(route, dtype, backend):
    case = make_case(1, (30,), 60, 4, 6, 5, dtype=dtype)
    residual = case.residual.requires_grad_()
    call(case, backend, residual=residual).backward(case.grad)
    assert torch.equal(residual.grad, case.grad)


@pytest.mark.parametrize("frozen", [0, 5, 40], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("eps", [1e-12, 10.0], ids=["norm", "clamped"])
def test_closed_form_equals_finite_differences(eps, training, frozen, monkeypatch):
    take_large_routes(monkeypatch)
    case = make_case(2, (200,), frozen, 3, 5, 3, top_k=3, threshold=0.1, eps=eps, training=training)
    case = keep_separated(case, 4, margin=2e-3)
    names = ("x", "current_keys", "current_values", "residual")
    leaves = [getattr(case, name).requires_grad_() for name in names]

    def run(*tensors):
        return call(case, "torch", **dict(zip(names, tensors, strict=True)))

    assert "_Retrieve" in type(run(*leaves).grad_fn).__name__
    assert torch.autograd.gradcheck(run, leaves)


class TestSecondDerivative:
    """Above FEW_SCORES the torch backend has none and must say so; the reference has one."""

    def first(self, backend, weights=None):
        tokens = torch_backend.FEW_SCORES // 4 + 1
        case = make_case(3, (tokens,), 0, 4, 6, 5, residual=False)
        x = case.x.requires_grad_()
        output = call(case, backend, x=x)
        loss = output.sum() if weights is None else (output * weights).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return x, loss, dx

    @pytest.mark.parametrize("weighted", [False, True])
    def test_is_refused_where_it_is_asked_for(self, weighted):
        # Refused at the first derivative: a gradient penalty must not lose its term silently.
        weights = torch.ones(5, dtype=torch.float64, requires_grad=True) if weighted else None
        with pytest.raises(RuntimeError, match=REFUSED):
            self.first("torch", weights)

    def test_of_the_reference_exists(self):
        x, loss, dx = self.first("reference")
        (penalty,) = torch.autograd.grad(dx.square().sum(), x, retain_graph=True)
        assert penalty.isfinite().all() and penalty.abs().max() > 0
        (loss + dx.square().sum()).backward()
        torch.testing.assert_close(x.grad, dx.detach() + penalty, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate(backend, route):
    case = make_case(4, (150,), 60, 4, 6, 5)
    keys = case.current_keys.requires_grad_()
    call(case, backend).backward(case.grad)
    once = keys.grad.clone()
    call(case, backend).backward(case.grad)
    torch.testing.assert_close(keys.grad, 2 * once, rtol=1e-14, atol=0)


def saved_bytes(function, owned):
    """Bytes of the storages that autograd keeps, each counted once, without those of the bank."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # The tensor itself is kept, so that no address is used twice.
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    mine = {tensor.untyped_storage().data_ptr() for tensor in owned}
    return sum(size for pointer, (size, _) in storages.items() if pointer not in mine)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_backward_keeps_about_a_third_of_what_the_plain_layer_keeps(training):
    # M1024-N1024-D768-O768-fp32. The bank is a layer's own memory and there without a backward;
    # x is counted for both, although a layer's input often lives on elsewhere.
    case = make_case(
        6, (1024,), 1016, 8, 768, 768, dtype=torch.float32, temperature=0.03, training=training
    )
    bank = {n: getattr(case, n) for n in ("keys", "values", "current_keys", "current_values")}
    for name in ("current_keys", "current_values"):
        bank[name].requires_grad_()
    x = case.x.requires_grad_()
    ours = saved_bytes(lambda: call(case, "torch", x=x), bank.values())

    plain_bank = [
        case.keys,
        case.values.t().contiguous(),
        case.current_keys,
        case.current_values.detach().t().contiguous().requires_grad_(),
    ]
    a = case.activation
    settings = {"top_k": a.top_k, "temperature": a.temperature, "threshold": a.threshold}
    plain = saved_bytes(
        lambda: plain_update(x, *plain_bank, case.residual, **settings, training=training),
        plain_bank,
    )
    assert ours >= x.nbytes
    assert ours <= 0.35 * plain, f"{ours / 2**20:.2f} MiB against {plain / 2**20:.2f} MiB"


def test_nothing_is_kept_without_a_gradient(route):
    case = make_case(7, (150,), 100, 4, 6, 5)
    assert saved_bytes(lambda: call(case, "torch"), ()) == 0
    assert saved_bytes(lambda: call(replace(case, residual=None), "torch"), ()) == 0
