"""torch.compile, fake tensors and autocast: one graph, and the same numbers as without them."""

from dataclasses import replace

import pytest
import torch
from support import LEAVES, make_case, run, take_large_routes, with_spare_rows
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from moram_kernels import retrieve, torch_backend

TOP_K = 2
# With top_k 2, up to 8 live atoms are dense and more are sparse: both meet in one graph.
LIVE = (0, 1, 8, 9, 33, 64)
CAPACITY = 64


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def bank_with(live, tokens=40, **settings):
    settings = {"top_k": TOP_K, "dtype": torch.float32, **settings}
    case = make_case(live, (tokens,), live, 3, 12, 10, **settings)
    return with_spare_rows(case, CAPACITY - live)


def function_of(activation, training):
    """A call among other operations: the doublings show that it composes with them."""

    def call(x, keys, values, current_keys, current_values, residual, num_frozen):
        return 2 * retrieve(
            2 * x,
            keys,
            values,
            activation,
            current_keys=current_keys,
            current_values=current_values,
            residual=residual,
            training=training,
            num_frozen=num_frozen,
        )

    return call


def compiled_for(activation, training):
    """The compiled call and the counter of its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(function_of(activation, training), fullgraph=True, backend=counter)
    return call, counter


def results_of(call, case):
    leaves = {n: getattr(case, n).detach().clone() for n in LEAVES if getattr(case, n) is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    others = {n: getattr(case, n) for n in ("keys", "values", "num_frozen")}
    residual = leaves.pop("residual", None)
    output = call(**leaves, **others, residual=residual)
    output.backward(case.grad)
    grads = {n: t.grad for n, t in {**leaves, "residual": residual}.items() if t is not None}
    return {"output": output.detach(), **grads}


def eager_results(case):
    """What the compiled call must give: the reference in float64, undoing both doublings."""
    exact = case.without_spare_rows().to(torch.float64)
    results = run(replace(exact, x=2 * exact.x, grad=2 * exact.grad), "reference")
    return {**results, "output": 2 * results["output"], "x": 2 * results["x"]}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name].double(),
            tensor.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_growing_bank_is_one_graph(training, residual):
    settings = {"training": training, "residual": residual, "dtype": torch.float64}
    activation = bank_with(0, **settings).activation
    call, counter = compiled_for(activation, training)
    for live in LIVE:
        case = bank_with(live, **settings)
        assert_same(results_of(call, case), eager_results(case), 1e-10)
    assert counter.frame_count == 1


def test_without_spare_rows_is_one_graph_too():
    case = make_case(1, (40,), 30, 3, 12, 10, top_k=TOP_K)
    call, counter = compiled_for(case.activation, True)
    assert_same(results_of(call, case), eager_results(case), 1e-10)
    assert counter.frame_count == 1


def test_the_number_of_tokens_may_be_dynamic():
    call, counter = compiled_for(bank_with(33).activation, True)
    for tokens in (40, 7, 300):
        case = bank_with(33, tokens, dtype=torch.float64)
        x = case.x.clone()
        leaves = [t.clone() for t in (x, case.residual)]
        for leaf in leaves:
            leaf.requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
        bank = [getattr(case, n) for n in ("keys", "values", "current_keys", "current_values")]
        output = call(leaves[0], *bank, leaves[1], case.num_frozen)
        output.backward(case.grad)
        expected = eager_results(case)
        actual = {"output": output.detach(), "x": leaves[0].grad, "residual": leaves[1].grad}
        assert_same(actual, {name: expected[name] for name in actual}, 1e-10)
    assert counter.frame_count == 1


@pytest.mark.parametrize("lead", [(), (2, 20)], ids=str)
def test_leading_dimensions_compile(lead):
    case = make_case(2, lead, 30, 3, 12, 10, top_k=TOP_K)
    call, counter = compiled_for(case.activation, True)
    assert_same(results_of(call, case), eager_results(case), 1e-10)
    assert counter.frame_count == 1


def test_no_tokens_compile():
    case = with_spare_rows(make_case(2, (0,), 30, 3, 12, 10, top_k=TOP_K), 34)
    call, _ = compiled_for(case.activation, True)
    results = results_of(call, case)
    assert results["output"].shape == (0, 10)
    assert results["current_keys"].shape == (3, 12) and not results["current_keys"].any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("live", [8, 64])
def test_autocast_changes_nothing(live, dtype, compiled, monkeypatch):
    # Bit for bit, hence by one route; test_numbers.py has the backward inside autocast.
    take_large_routes(monkeypatch)
    # The bank is always float32; x and the residual are what a half-precision model would send.
    case = bank_with(live)
    case = replace(case, **{n: getattr(case, n).to(dtype) for n in ("x", "residual", "grad")})
    results = []
    for enabled in (False, True):
        torch.compiler.reset()
        make = (lambda *a: compiled_for(*a)[0]) if compiled else function_of
        call = make(case.activation, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            leaves = {n: getattr(case, n).clone().requires_grad_() for n in LEAVES}
            output = call(**leaves, keys=case.keys, values=case.values, num_frozen=case.num_frozen)
        output.backward(case.grad)
        results.append([output.detach(), *(leaf.grad for leaf in leaves.values())])
    for name, without, with_autocast in zip(("output", *LEAVES), *results, strict=True):
        assert without.dtype == with_autocast.dtype, name
        assert torch.equal(without, with_autocast), name


def op_arguments(live, **settings):
    """Positional arguments of torch.ops.moram.retrieve, and the case they come from."""
    case = bank_with(live, **settings)
    bank = (case.keys, case.values, case.current_keys, case.current_values)
    a = case.activation
    rule = (a.top_k, a.temperature, a.threshold, a.eps, case.training)
    return (case.x, *bank, case.residual, case.num_frozen, *rule), case


def backward_arguments(live, **settings):
    arguments, case = op_arguments(live, **settings)
    _, *saved = torch.ops.moram.retrieve(*arguments)
    x, *bank = arguments[:5]
    return (case.grad, x, *bank, *saved, case.num_frozen, *arguments[7:])


OP_CASES = [
    {"live": 0},
    {"live": 8},
    {"live": 33},
    {"live": 64, "residual": False, "training": False},
    {"live": 33, "dtype": torch.bfloat16},
    {"live": 33, "top_k": 40},
]


@pytest.mark.parametrize("settings", [*OP_CASES, {"live": 33, "tokens": 1}], ids=str)
@pytest.mark.parametrize("name", ["retrieve", "retrieve_backward"])
def test_opcheck(name, settings):
    forward = name == "retrieve"
    arguments = op_arguments(**settings)[0] if forward else backward_arguments(**settings)
    op = getattr(torch.ops.moram, name).default
    outcome = torch.library.opcheck(op, arguments)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("keep", [0.5, 1000], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("settings", OP_CASES, ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(settings, tokens, keep, monkeypatch):
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", keep)
    for name, make in (
        ("retrieve", lambda **s: op_arguments(**s)[0]),
        ("retrieve_backward", backward_arguments),
    ):
        arguments = make(tokens=tokens, **settings)
        op = getattr(torch.ops.moram, name)
        real = op(*arguments)
        mode = FakeTensorMode()
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with mode:
            faked = op(*fake)
        assert len(real) == len(faked)
        if name == "retrieve":
            # More scores than this are recomputed, not kept, whatever the capacity.
            assert real[-1].shape[1] <= keep * arguments[0].shape[1]
        for one, other in zip(real, faked, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            # Strides of dimensions without a second element say nothing.
            assert one.is_contiguous() and other.is_contiguous()
