"""Running the operator on a named path, and reading back which atoms its kernels selected."""

from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from oracle import check_selection, check_values, exact_scores, kept_above, kept_in_lists
from support import LEAVES

from moram_kernels import SelfActivation, fused_ops, retrieve
from moram_kernels.triton_backend.segments import Table

# Decode keeps nothing for a backward.
TRAINED = ("resident", "split-dense", "split-gather")
ALL = (*TRAINED, "decode")


@contextmanager
def forced(path):
    """Every call of the Triton backend takes this path; None leaves the plan alone."""
    original, taken = fused_ops.plan, []

    def plan(*args, keep=None, **more):
        if path == "split-gather":
            keep = "lists"
        chosen = original(*args, keep=keep, **{**more, "path": path})
        taken.append(chosen)
        return chosen

    fused_ops.plan = plan
    try:
        yield taken
    finally:
        fused_ops.plan = original
    assert taken, "no call of the Triton backend was planned"


def call(case, path, precision="ieee", **changes):
    """The operator's output on a path; changes replace tensors of the case."""
    names = [f.name for f in fields(case) if f.name not in ("activation", "training", "grad")]
    tensors = {name: getattr(case, name) for name in names} | changes
    with forced(path):
        return retrieve(
            **tensors,
            activation=case.activation,
            training=case.training,
            backend="triton",
            precision=precision,
        )


def run_training(case, path, precision="ieee", wanted=LEAVES):
    """(output and gradients by name, the selection that the forward kept for the backward)."""
    leaves = {n: getattr(case, n) for n in wanted if getattr(case, n) is not None}
    # A detached view keeps the strides, so the kernels meet the layout that the case has.
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    output = call(case, path, precision, **leaves)
    kept = selection(output, case)
    with forced(path):
        if case.grad is None:
            output.sum().backward()
        else:
            output.backward(case.grad.to(output.dtype))
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), **grads}, kept


def selection(output, case):
    """The selection [M, N] in what a differentiable output kept for its backward."""
    live = case.without_spare_rows()
    current = 0 if live.current_keys is None else len(live.current_keys)
    num_atoms = len(live.keys) + current
    top_k = min(case.activation.top_k, num_atoms)
    index, _, scores, stats = output.grad_fn.saved_tensors[5:9]
    if index.shape[1]:
        return kept_in_lists(index, num_atoms)
    return kept_above(scores[:, :num_atoms], stats[3], top_k)


def run_inference(case, path, precision="ieee"):
    """({"output": ..}, selection), without gradients.

    The selection is that of a second call, whose values make the output weight x score per atom.
    Where that is 0 (a score of 0, or underflow) it does not tell, and the largest scores are taken.
    """
    output = call(case, path, precision)
    live, settings = case.without_spare_rows(), case.activation
    frozen, num_atoms = len(live.keys), len(exact_scores(case)[0].T)
    # Columns of zeros after one column an atom: some paths want a multiple of 32.
    each = torch.eye(num_atoms, -(-num_atoms // 32) * 32, dtype=case.keys.dtype)
    probe = replace(
        live,
        values=each[:frozen],
        current_values=None if live.current_keys is None else each[frozen:],
        residual=torch.zeros(len(case.x), each.shape[1]),
        activation=SelfActivation(settings.top_k, settings.temperature, 0.0, settings.eps),
    )
    wrote = call(probe, path, precision)[:, :num_atoms] != 0
    scores = exact_scores(case)[0]
    count = min(settings.top_k, num_atoms) - wrote.sum(-1)
    order = scores.masked_fill(wrote, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return {"output": output}, wrote | (rank < count[:, None])


def check_call(case, path, *, precision="ieee", exact=False, roundings=1, wanted=LEAVES):
    """Assert parity of a call, and of its gradients, on a path; the tally of its selection."""
    if path == "decode":
        actual, kept = run_inference(case, path, precision)
    else:
        actual, kept = run_training(case, path, precision, wanted)
    tally = check_selection(case, kept, exact=exact, roundings=roundings)
    check_values(actual, case, kept, gram=path == "split-gather")
    return tally


def piece_table(frozen, current, width, dtype, seed=0):
    """A random `Table` of two separate pieces, with a gap of NaN between rows of the first."""
    generator = torch.Generator().manual_seed(seed + width)
    wide = torch.full((frozen, width + 3), float("nan"), dtype=dtype)
    wide[:, :width] = torch.randn(frozen, width, generator=generator).to(dtype)
    rows = torch.randn(current, width, generator=generator).to(dtype)
    return Table.of(wide[:, :width], rows)


@contextmanager
def within(rows, width, dtype=torch.float32):
    """A matrix to fill, inside a larger one that must not change around it."""
    mark = 77.0
    buffer = torch.full((rows + 2, width + 5), mark, dtype=dtype)
    inside = buffer[1:-1, :width]
    inside[:] = float("nan")
    yield inside
    assert not inside.isnan().any(), "not every element was written"
    around = buffer.clone()
    around[1:-1, :width] = mark
    assert (around == mark).all(), "something was written outside the output"
