"""Launches that are remembered: the same as Triton's own, for as long as nothing has changed."""

import gc
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton
from recording_driver import RecordingDriver, recorded
from support import make_case

from moram_kernels import SelfActivation, calls, fused_ops, retrieve, retrieve_linear, sharing
from moram_kernels.triton_backend import launcher

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def driver():
    with recorded() as recorder:
        yield recorder


def force(monkeypatch, path):
    plan = fused_ops.plan
    monkeypatch.setattr(fused_ops, "plan", lambda *a, **k: plan(*a, **(k | {"path": path})))


def call(case, **changes):
    tensors = {
        "x": case.x,
        "keys": case.keys,
        "values": case.values,
        "current_keys": case.current_keys,
        "current_values": case.current_values,
        "residual": case.residual,
    }
    how = {"activation": case.activation, "training": case.training, "backend": "triton"}
    return retrieve(**tensors | how | changes)


def train(case):
    leaves = [
        t for t in (case.x, case.current_keys, case.current_values, case.residual) if t is not None
    ]
    leaves = [t.requires_grad_() for t in leaves]
    torch.autograd.grad(call(case), leaves, case.grad)


def launches(driver, run):
    """(what was launched, how many of that by Triton's own path)."""
    driver.launched.clear()
    driver.arguments.clear()
    with mock.patch.object(launcher, "start", wraps=launcher.start) as start:
        run()
    found = []
    for function, (grid, stream, arguments) in zip(driver.launched, driver.arguments, strict=True):
        shown = [
            (a.shape, a.stride(), a.dtype, a.data_ptr() % 16) if torch.is_tensor(a) else a
            for a in arguments
        ]
        found.append((function, function.binary, function.device, grid, stream, shown))
    return found, start.call_count


def assert_known_equals_own(driver, run):
    """Launches of known calls are those of Triton's own path, which they do not take."""
    calls.forget()
    own, started = launches(driver, run)
    assert own and started == len(own)
    for _ in range(2):
        known, started = launches(driver, run)
        assert known == own and not started


def moved(tensor, elements):
    """The same matrix, its first element so many elements behind a multiple of 16 bytes."""
    if tensor is None:
        return None
    wide = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    place = wide[elements:].view(tensor.shape)
    return place.copy_(tensor)


def spread(tensor, columns):
    """The same matrix, its rows so many numbers further apart."""
    if tensor is None:
        return None
    wide = torch.empty(tensor.shape[0], tensor.shape[1] + columns, dtype=tensor.dtype)
    return wide[:, : tensor.shape[1]].copy_(tensor)


VARIANTS = {
    "as it is": lambda t: t,
    "off by one element": lambda t: moved(t, 1),
    "rows apart": lambda t: spread(t, 16),
    "columns apart": lambda t: None if t is None else t.t().contiguous().t(),
}


def varied(case, name):
    change = VARIANTS[name]
    names = ("x", "keys", "values", "current_keys", "current_values", "residual")
    return replace(case, **{n: change(getattr(case, n)) for n in names})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", ["resident", "decode", "split-dense", "split-gather"])
def test_known_launches_of_inference_are_tritons_own(path, variant, driver, monkeypatch):
    force(monkeypatch, path)
    case = varied(make_case(0, (37,), 40, 8, 128, 128, dtype=BF16, training=False), variant)
    assert_known_equals_own(driver, lambda: call(case))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("path", ["resident", "split-dense", "split-gather"])
def test_known_launches_of_training_are_tritons_own(path, dtype, driver, monkeypatch):
    force(monkeypatch, path)
    case = make_case(0, (200,), 40, 8, 64, 64, dtype=dtype)
    assert_known_equals_own(driver, lambda: train(case))


def test_known_launches_of_chunks_of_a_large_bank_are_tritons_own(driver, monkeypatch):
    plan = fused_ops.plan
    monkeypatch.setattr(fused_ops, "plan", lambda *a, **k: replace(plan(*a, **k), chunk=64))
    case = make_case(0, (150,), 9000, 8, 32, 32, dtype=BF16, training=False)
    assert_known_equals_own(driver, lambda: call(case))


def linear(case, weight, **more):
    current = {"current_keys": case.current_keys, "current_values": case.current_values}
    args = (case.x, weight, None, case.keys, case.values, case.activation)
    return retrieve_linear(*args, **current, backend="triton", **more)


def test_known_launches_onto_a_linear_are_tritons_own(driver):
    case = make_case(0, (2, 9), 24, 8, 64, 32, dtype=BF16, training=False)
    weight = torch.ones(32, 64, dtype=BF16)
    assert_known_equals_own(driver, lambda: linear(case, weight))


def test_a_weight_that_is_trained_gets_its_gradient_after_calls_that_did_not_train_it(driver):
    case = make_case(0, (18,), 24, 8, 64, 32, dtype=BF16)
    weight = torch.ones(32, 64, dtype=BF16)
    linear(case, weight, training=True)
    output = linear(case, weight.requires_grad_(), training=True)
    output.backward(case.grad)
    assert torch.equal(weight.grad, case.grad.T @ case.x)


def test_autocast_is_seen_after_calls_without_it(driver):
    case = make_case(0, (18,), 24, 8, 64, 32, dtype=F32, training=False)
    weight = torch.ones(32, 64)
    assert linear(case, weight).dtype == F32
    with torch.autocast("cpu", BF16):
        assert linear(case, weight).dtype == BF16


def test_known_launches_of_shared_scores_are_tritons_own(driver, monkeypatch):
    force(monkeypatch, "split-dense")
    cases = [make_case(0, (200,), *size, 128, 64, dtype=BF16) for size in ((40, 8), (20, 16))]
    banks = [(c.keys, c.values, c.current_keys, c.current_values) for c in cases]
    how = {"training": True, "backend": "triton"}
    assert_known_equals_own(
        driver, lambda: sharing.shared_scores(cases[0].x, banks, SelfActivation(4), **how)
    )


def test_what_one_call_is_known_by_launches_no_other(driver, monkeypatch):
    """Sizes, settings and places that take turns: each is launched as if it were the first."""
    force(monkeypatch, "split-dense")
    base = make_case(0, (33,), 24, 8, 64, 64, dtype=BF16, training=False)
    others = [
        base,
        varied(base, "off by one element"),
        varied(base, "rows apart"),
        replace(base, x=base.x[:32], residual=base.residual[:32]),
        replace(base, x=base.x[:1], residual=base.residual[:1]),
        replace(base, residual=None),
        replace(base, residual=base.residual.float()),
        replace(base, keys=base.keys[:23], values=base.values[:23]),
        replace(base, activation=SelfActivation(4)),
        replace(base, activation=SelfActivation(8, threshold=0.0)),
        replace(base, training=True),
    ]
    own = []
    for case in others:
        calls.forget()
        own.append(launches(driver, lambda case=case: call(case))[0])
    for _ in range(2):
        for case, expected in zip(others, own, strict=True):
            assert launches(driver, lambda case=case: call(case))[0] == expected


def test_a_bank_that_became_one_piece_is_launched_anew(driver, monkeypatch):
    """The same shapes and strides, but now the library multiplies: other launches."""
    force(monkeypatch, "split-dense")
    monkeypatch.setattr(launcher, "can_multiply", lambda left, right: True)
    multiplied = []
    monkeypatch.setattr(launcher, "multiply", lambda *args: multiplied.append(len(args)))
    case = make_case(0, (33,), 24, 8, 64, 64, dtype=BF16, training=False, residual=False)
    keys = torch.cat([case.keys, case.current_keys])
    one = replace(case, keys=keys[:24], current_keys=keys[24:])
    for _ in range(2):
        names = [launch[0] for launch in launches(driver, lambda: call(case))[0]]
        assert names == ["_score_kernel", "_select_kernel", "_aggregate_kernel"]
        names = [launch[0] for launch in launches(driver, lambda: call(one))[0]]
        assert names == ["_select_kernel", "_aggregate_kernel"]
    assert len(multiplied) == 2


@pytest.fixture
def small():
    return make_case(0, (20,), 24, 8, 64, 64, dtype=BF16, training=False)


def test_launches_go_to_the_stream_of_their_time(driver, small):
    for stream in (0, 7, 9):
        driver.stream = stream
        assert {launch[4] for launch in launches(driver, lambda: call(small))[0]} == {stream}


def test_another_device_is_launched_on_anew(driver, small):
    first = launches(driver, lambda: call(small))[0]
    driver.device = 1
    second, started = launches(driver, lambda: call(small))
    assert started == len(second) and {launch[2] for launch in second} == {1}
    driver.device = 0
    assert launches(driver, lambda: call(small)) == (first, 0)


def test_another_driver_gets_no_kernel_of_the_first(small):
    binaries = []
    for arch in (90, 80, 90):
        driver = RecordingDriver(arch)
        # Triton, too, remembers kernels by device.
        driver.device = arch
        with recorded(driver):
            found, started = launches(driver, lambda: call(small))
            assert started == len(found)
            binaries.append([launch[1] for launch in found])
    assert binaries[0] == binaries[2]
    assert all(mine != other for mine, other in zip(binaries[0], binaries[1], strict=True))


def test_launch_hooks_see_every_launch(driver, small):
    launches(driver, lambda: call(small))
    seen = []
    hook = triton.knobs.runtime.launch_enter_hook
    note = lambda about: seen.append(about.get()["name"])  # noqa: E731 - removed by its identity
    hook.add(note)
    try:
        # The recorder leaves the calling of hooks to the driver, and notes what it was given.
        found, started = launches(driver, lambda: call(small))
    finally:
        hook.remove(note)
    assert started == len(found)
    assert launches(driver, lambda: call(small))[1] == 0


def test_changing_shapes_do_not_pile_up(driver, monkeypatch):
    monkeypatch.setattr(calls, "LIMIT", 3)
    case = make_case(0, (20,), 24, 8, 64, 64, dtype=BF16, training=False, residual=False)
    for rows in range(8, 20):
        call(replace(case, x=case.x[:rows]))
        assert len(calls._Memory.calls) <= 3
    assert launches(driver, lambda: call(replace(case, x=case.x[:19])))[1] == 0
    assert launches(driver, lambda: call(replace(case, x=case.x[:8])))[1] > 0


def test_nothing_that_is_remembered_holds_a_tensor(driver):
    case = make_case(0, (200,), 40, 8, 128, 128, dtype=BF16)
    tensors = [case.x, case.keys, case.values, case.current_keys, case.current_values, case.grad]
    alive = [weakref.ref(tensor) for tensor in tensors]
    for _ in range(2):
        train(case)
    # The recorder has arguments of its own.
    driver.arguments.clear()
    del case, tensors
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_what_is_refused_is_refused_after_calls_that_were_not(driver, small):
    call(small)
    with pytest.raises(ValueError, match="values must have the dtype of keys"):
        call(small, values=small.values.float())
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        call(small, x=[1.0])
    with pytest.raises(ValueError, match="precision must be one of"):
        call(small, precision="tf32")


def test_a_call_that_is_known_here_is_refused_without_a_driver(small, monkeypatch):
    with recorded():
        call(small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match='backend="triton" cannot run'):
        call(small)
