"""How many kernels and products a call launches, and what else it runs: allocations and views."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from launches import counted, intercepted
from paths import forced
from support import make_case, run, with_spare_rows
from torch.utils._python_dispatch import TorchDispatchMode

from moram_kernels import fused_ops, retrieve
from moram_kernels.aliases import Bank
from moram_kernels.triton_backend import launcher
from moram_kernels.triton_backend import plan as planning

# (frozen, current): one segment, the other, both.
BANKS = {"frozen": (24, 0), "current": (0, 24), "both": (20, 4)}
FORWARD = {
    "resident": ["_resident_kernel"],
    "decode": ["_score_kernel", "_decode_kernel"],
    "split-dense": ["_score_kernel", "_select_kernel", "_aggregate_kernel"],
    "split-gather": ["_score_kernel", "_select_kernel", "_gather_kernel"],
}
DENSE_BACKWARD = ["_score_kernel", "_rows_backward_kernel", "_aggregate_kernel"]
LISTS_BACKWARD = ["_lists_backward_kernel", "_gram_kernel", "_score_kernel", "_gather_kernel"]
BANK_GRADIENT = ["_bank_gradient_kernel", "_sum_splits_kernel"]


def case_of(bank, tokens=20, **settings):
    settings = {"dtype": torch.float32, **settings}
    return make_case(5, (tokens,), *BANKS[bank], 64, 32, **settings)


def call(case):
    return retrieve(
        case.x,
        case.keys,
        case.values,
        case.activation,
        current_keys=case.current_keys,
        current_values=case.current_values,
        residual=case.residual,
        training=case.training,
        backend="triton",
        num_frozen=case.num_frozen,
    )


def leaves_of(case):
    leaves = (case.x, case.current_keys, case.current_values, case.residual)
    return [t.requires_grad_() for t in leaves if t is not None]


ALLOCATIONS = ("new_empty", "new_empty_strided", "empty_like")


class Operations(TorchDispatchMode):
    """Counts the aten operations of a block, and the bytes that they allocate; not Triton's own."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names[name] += 1
        if name in ALLOCATIONS:
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result

    def allocations(self):
        """How many tensors were allocated; they are not counted again."""
        return sum(self.names.pop(name, 0) for name in ALLOCATIONS)

    @staticmethod
    def outside(launch, *args, **meta):
        """A launch that is not counted: the interpreter makes tensors of its own."""
        with torch.utils._python_dispatch._disable_current_modes():
            launch(*args, **meta)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("path", FORWARD)
def test_launches_of_inference(path, bank):
    case = case_of(bank, training=False)
    with counted() as launches, forced(path):
        call(case)
    assert launches == FORWARD[path]


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("path", ["resident", "split-dense", "split-gather"])
def test_at_most_five_launches_of_a_backward_with_all_gradients(path, bank):
    case = case_of(bank, tokens=40)
    leaves = leaves_of(case)
    with counted() as launches, forced(path):
        output = call(case)
    assert launches == FORWARD[path]
    with counted() as launches, forced(path):
        output.backward(case.grad)
    expected = LISTS_BACKWARD if path == "split-gather" else DENSE_BACKWARD
    if bank != "frozen":
        expected = expected + BANK_GRADIENT[: 5 - len(expected)]
    assert launches == expected and len(launches) <= 5
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("path, launches", [("split-dense", 2), ("split-gather", 1)])
def test_gradients_that_nobody_wants_are_not_computed(path, launches):
    case = case_of("both")
    case.residual.requires_grad_()
    case.current_keys.requires_grad_()
    with forced(path):
        output = call(case)
    with counted() as backward, forced(path):
        output.backward(case.grad)
    # Without dx: no product with the keys, no gather.
    assert len([name for name in backward if name not in BANK_GRADIENT]) == launches


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_three_launches_for_more_atoms_than_a_row_holds(training):
    case = make_case(5, (2,), 8190, 6, 16, 16, training=training, dtype=torch.float32)
    leaves = leaves_of(case) if training else []
    with counted() as launches:
        output = call(case)
    assert launches == ["_score_kernel", "_group_kernel", "_gather_kernel"]
    if leaves:
        with counted() as launches:
            output.backward(case.grad)
        assert launches == [*LISTS_BACKWARD, "_bank_gradient_kernel"]


@pytest.fixture
def library(monkeypatch):
    """Lets the vendor's library stand in for kernels as on a GPU, emulated in float32."""

    def multiply(left, right, out):
        assert left.dtype == right.dtype == torch.bfloat16
        out.copy_(left.float() @ right.float())

    def multiply_add(base, left, right, out):
        assert left.dtype == right.dtype == base.dtype == out.dtype == torch.bfloat16
        out.copy_(base.float() + left.float() @ right.float())

    def can_multiply(left, right):
        return left.dtype == right.dtype and left.itemsize == 2

    def install():
        for function in (multiply, multiply_add, can_multiply):
            monkeypatch.setattr(launcher, function.__name__, function)

    return install


def joined(case):
    """The same bank, its current rows right behind the frozen ones in one buffer."""
    count = case.keys.shape[0]
    keys = torch.cat([case.keys, case.current_keys])
    values = torch.cat([case.values, case.current_values])
    current = {"current_keys": keys[count:], "current_values": values[count:]}
    return replace(case, keys=keys[:count], values=values[:count], **current)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("bank", [*BANKS, "joined", "copied"])
@pytest.mark.parametrize("path", ["split-dense", "split-gather"])
def test_products_of_16_bit_banks_in_one_piece_go_to_the_library(
    path, bank, residual, library, monkeypatch
):
    settings = {"tokens": 40, "dtype": torch.bfloat16, "residual": residual}
    case = case_of("both" if bank in ("joined", "copied") else bank, **settings)
    case = joined(case) if bank == "joined" else case
    if bank == "copied":
        plan = fused_ops.plan

        def copying(*args, **how):
            return replace(plan(*args, **how), copy=True)

        monkeypatch.setattr(fused_ops, "plan", copying)
    with forced(path):
        expected = run(case, "triton")
    library()
    with counted() as launches, forced(path):
        actual = run(case, "triton")
    whole = bank != "both"
    product = "multiply" if whole else "_score_kernel"
    sums = "multiply" if whole else "_aggregate_kernel"
    if path == "split-gather":
        square = "multiply" if whole else "_gram_kernel"
        # The square of the keys is one piece whatever the bank is.
        backward = ["_lists_backward_kernel", square, "multiply", "_gather_kernel"]
        forward = [product, "_select_kernel", "_gather_kernel"]
    else:
        backward = [product, "_rows_backward_kernel", sums]
        # The library would copy a residual that is not the output.
        forward = [product, "_select_kernel", "_aggregate_kernel" if residual else sums]
    bank_gradient = [name for name in launches if name in BANK_GRADIENT]
    assert launches == forward + backward + bank_gradient
    assert len(launches) <= 3 + 5 and bool(bank_gradient) == (bank != "frozen")
    assert_close_to_a_rounding(actual, expected)


def assert_close_to_a_rounding(actual, expected):
    """Equal up to one rounding of the largest number, where the sums round differently."""
    for name, tensor in expected.items():
        step = torch.finfo(torch.bfloat16).eps * tensor.abs().max().item()
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=step)


def test_the_library_adds_to_an_output_that_is_there_already(library):
    case = case_of("frozen", dtype=torch.bfloat16, training=False, residual=False)
    weight, bias = case.values.new_ones(32, 64), case.values.new_ones(32)
    a = case.activation
    bank = Bank(case.keys, case.values, case.keys[:0], case.values[:0])
    rule = (a.top_k, a.temperature, a.threshold, a.eps)
    arguments = (case.x, weight, bias, bank, rule, False, "ieee")
    with forced("split-dense"):
        expected = fused_ops.retrieve_linear_triton(*arguments)
    library()
    with counted() as launches, forced("split-dense"):
        actual = fused_ops.retrieve_linear_triton(*arguments)
    assert launches == ["multiply", "_select_kernel", "multiply_add"]
    assert_close_to_a_rounding({"output": actual}, {"output": expected})


# Neither reads nor writes an element: views, and a question about dtypes.
FREE = {"slice", "detach", "view", "alias", "as_strided", "promote_types"}


@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("path", FORWARD)
def test_inference_only_allocates(path, spare):
    """The output, and what lies between two launches: no concatenation, no copy of the bank."""
    case = case_of("both", training=False)
    case = with_spare_rows(case, spare) if spare else case
    operations = Operations()
    with operations, forced(path), intercepted(operations.outside):
        call(case)
    names = operations.names
    between = {"resident": 0, "decode": 1, "split-dense": 2, "split-gather": 4}[path]
    assert operations.allocations() == 1 + between
    if spare:
        # The number of live rows, which lies on the CPU: asked when checked, and when used.
        assert names.pop("_local_scalar_dense") == 2
    assert names.keys() <= FREE, names


@pytest.mark.parametrize("path", ["resident", "split-dense", "split-gather"])
def test_training_only_allocates(path):
    case = case_of("both", tokens=40)
    leaves = leaves_of(case)
    operations = Operations()
    with operations, forced(path), intercepted(operations.outside):
        output = call(case)
    names = operations.names
    # The output; index, picked, scores and stats; weighted scores; all scores, if lists are kept.
    more = {"resident": 0, "split-dense": 1, "split-gather": 2}[path]
    assert operations.allocations() == 5 + more
    assert names.keys() <= FREE, names
    operations = Operations()
    with operations, forced(path), intercepted(operations.outside):
        torch.autograd.grad(output, leaves, case.grad)
    names = operations.names
    # dscores, written, and the pull, or factor, square and their product with x; dx, and for lists
    # their gradient; both gradients of the bank in one piece, and their partial sums.
    assert operations.allocations() == (5 + 2 + 1 if path == "split-gather" else 3 + 1 + 2)
    assert names.keys() <= FREE, names


@pytest.mark.parametrize("path", ["split-dense", "split-gather"])
@pytest.mark.parametrize("bank", ["frozen", "both"])
def test_chunks_of_tokens_bound_the_scores_and_give_the_same_bits(bank, path, monkeypatch):
    tokens, atoms, rows = 130 if path == "split-dense" else 70, sum(BANKS[bank]), 64
    case = case_of(bank, tokens, training=False)
    with forced(path):
        whole = call(case)
    monkeypatch.setattr(planning, "SCORE_BYTES", 4 * atoms * rows)
    planning._plan.cache_clear()
    try:
        operations = Operations()
        with counted() as launches, forced(path):
            chunked = call(case)
        with operations, forced(path), intercepted(operations.outside):
            call(case)
    finally:
        monkeypatch.undo()
        planning._plan.cache_clear()
    assert launches == FORWARD[path] * math.ceil(tokens / rows)
    assert torch.equal(chunked, whole)
    # The largest allocation is the output, or the scores of a chunk in rows of 16 numbers.
    assert operations.largest == max(tokens * 32 * 4, rows * -(-atoms // 16) * 16 * 4)


def test_lists_for_training_are_made_in_chunks_too(monkeypatch):
    case = case_of("both", 70)
    with forced("split-gather"):
        whole = run(case, "triton")
    monkeypatch.setattr(planning, "SCORE_BYTES", 1)
    planning._plan.cache_clear()
    try:
        with counted() as launches, forced("split-gather"):
            chunked = run(case, "triton")
    finally:
        monkeypatch.undo()
        planning._plan.cache_clear()
    assert launches == FORWARD["split-gather"] * 2 + [*LISTS_BACKWARD, "_bank_gradient_kernel"]
    for name, tensor in whole.items():
        assert torch.equal(chunked[name], tensor), name
