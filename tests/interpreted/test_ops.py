"""The fused ops under torch's tools: opcheck, fake tensors, torch.compile, torch.export.

How they behave in eager calls (bits, checkpointing, empty inputs): `test_bits.py`.
"""

from dataclasses import replace

import pytest
import torch
from fused_cases import (
    FORMS,
    OP_CASES,
    OUT,
    WIDTH,
    assert_same,
    assert_same_bits,
    backward_arguments,
    bank_with,
    capacity_of,
    case_named,
    op_arguments,
    without,
)
from support import LEAVES, laid_out, make_case, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from moram_kernels import retrieve


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, name):
    case = case_named(name, form)
    forward, backward = torch.ops.moram.retrieve_fused, torch.ops.moram.retrieve_fused_backward
    calls = [
        (forward, op_arguments(case)),
        (forward, op_arguments(case, save=False)),
        (backward, backward_arguments(case)),
    ]
    for op, arguments in calls:
        outcome = torch.library.opcheck(op.default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("form", FORMS)
def test_fake_tensors_are_like_real_ones(form, name, layout):
    case = case_named(name, form)
    tensors = {n: getattr(case, n) for n in ("x", "current_keys", "current_values", "residual")}
    case = replace(
        case, **{n: None if t is None else laid_out(t, layout) for n, t in tensors.items()}
    )
    forward, backward = torch.ops.moram.retrieve_fused, torch.ops.moram.retrieve_fused_backward
    for op, arguments in (
        (forward, op_arguments(case)),
        (forward, op_arguments(case, save=False)),
        (backward, backward_arguments(case)),
    ):
        real = op(*arguments)
        mode = FakeTensorMode()
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with mode:
            faked = op(*fake)
        assert len(real) == len(faked)
        for one, other in zip(real, faked, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            # Strides of dimensions without a second element say nothing.
            assert one.is_contiguous() and other.is_contiguous()


@pytest.mark.parametrize("name", [n for n in OP_CASES if n != "half"])
@pytest.mark.parametrize("form", FORMS)
def test_the_op_gives_what_the_reference_gives(form, name):
    """Bits that no live atom has (spare rows are NaN) never reach a result."""
    case = case_named(name, form)
    exact = case.without_spare_rows().to(torch.float64)
    if not (len(exact.keys) or exact.current_keys is not None):
        # An empty bank updates nothing; the reference refuses it.
        expected = {"output": exact.residual, "x": torch.zeros_like(exact.x)}
    else:
        expected = run(exact, "reference")
    output, *_ = torch.ops.moram.retrieve_fused(*op_arguments(case))
    grads = torch.ops.moram.retrieve_fused_backward(*backward_arguments(case))
    names = ("x", "current_keys", "current_values")
    actual = {"output": output, **dict(zip(names, grads, strict=True))}
    assert_same({n: t for n, t in actual.items() if n in expected}, without(expected, "residual"))


def compiled_for(activation, training):
    """A compiled call among other operations, and the counter of its graphs."""

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
            backend="triton",
            num_frozen=num_frozen,
        )

    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(call, fullgraph=True, backend=counter), counter


def results_of(call, case, dynamic=False):
    leaves = {n: getattr(case, n).detach().clone() for n in LEAVES}
    for name, leaf in leaves.items():
        leaf.requires_grad_()
        if dynamic and name in ("x", "residual"):
            torch._dynamo.mark_dynamic(leaf, 0)
    output = call(**leaves, keys=case.keys, values=case.values, num_frozen=case.num_frozen)
    output.backward(case.grad)
    return {"output": output.detach(), **{n: t.grad for n, t in leaves.items()}}


def eager_results(case, backend):
    """What the compiled call must give, undoing both doublings."""
    results = run(replace(case, x=2 * case.x, grad=2 * case.grad), backend)
    return {**results, "output": 2 * results["output"], "x": 2 * results["x"]}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", FORMS)
def test_a_growing_bank_and_other_token_counts_are_one_graph(form, training):
    call, counter = compiled_for(bank_with(form, 0).activation, training)
    full = capacity_of(form)
    for live, tokens in ((full // 2, 7), (full, 3), (0, 7), (1, 20)):
        case = bank_with(form, live, tokens, training=training)
        actual = results_of(call, case, dynamic=True)
        assert_same(actual, eager_results(case, "triton"))
        exact = case.without_spare_rows().to(torch.float64)
        assert_same(actual, eager_results(exact, "reference"))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients_it_compiles_too(form):
    case = bank_with(form, 11, training=False)
    call, counter = compiled_for(case.activation, False)
    names = ("x", "keys", "values", "current_keys", "current_values", "residual", "num_frozen")
    with torch.no_grad():
        output = call(**{n: getattr(case, n) for n in names})
    exact = eager_results(case.without_spare_rows().to(torch.float64), "reference")
    assert_same({"output": output}, {"output": exact["output"]})
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_bank_without_spare_rows_compiles(training):
    case = make_case(1, (2, 5), 13, 3, WIDTH, OUT, training=training, dtype=torch.float32)
    call, counter = compiled_for(case.activation, training)
    assert_same(results_of(call, case), eager_results(case.to(torch.float64), "reference"))
    assert counter.frame_count == 1


def test_compiling_warns_of_nothing(recwarn):
    # Dynamo tells a process only once.
    torch._dynamo.utils.warn_once_cache.clear()
    case = bank_with("dense", 11)
    call, _ = compiled_for(case.activation, True)
    results_of(call, case)
    ours = [w for w in recwarn if "invalid value" not in str(w.message)]
    assert not ours, [str(w.message) for w in ours]


class Layer(torch.nn.Module):
    """A bank with a call on the Triton backend."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        for name in ("keys", "values", "current_keys", "current_values", "num_frozen"):
            self.register_buffer(name, getattr(case, name))

    def forward(self, x, residual):
        return retrieve(
            x,
            self.keys,
            self.values,
            self.case.activation,
            current_keys=self.current_keys,
            current_values=self.current_values,
            residual=residual,
            backend="triton",
            num_frozen=self.num_frozen,
        )


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "traced"])
@pytest.mark.parametrize("form", FORMS)
def test_a_module_exports_for_any_number_of_tokens(form, strict):
    case = bank_with(form, 11, training=False)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(
        Layer(case),
        (case.x, case.residual),
        dynamic_shapes={"x": {0: tokens}, "residual": {0: tokens}},
        strict=strict,
    )
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("retrieve_fused" in name for name in names), names
    other = bank_with(form, 11, tokens=40, training=False)
    other = replace(other, **{n: getattr(case, n) for n in ("keys", "values", "num_frozen")})
    other = replace(other, current_keys=case.current_keys, current_values=case.current_values)
    exact = run(other.without_spare_rows().to(torch.float64), "reference")["output"]
    output = program.module()(other.x, other.residual)
    assert_same({"output": output}, {"output": exact})


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit_of_the_compiled_op(form):
    case = bank_with(form, 11)
    results = []
    for enabled in (False, True):
        torch.compiler.reset()
        compiled, _ = compiled_for(case.activation, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(results_of(compiled, case))
    assert_same_bits(*results)
