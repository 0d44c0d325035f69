"""Kernels of the backward of self-activation, each alone: from saved scores and from lists.

Scores are given, as in test_interpreted_select.py: the oracle's keys are the identity, so that its
gradient of x is the gradient of the scores. Values and output gradients are small integers, which
makes the pull of every atom exact.
"""

from dataclasses import replace

import pytest
import torch
from oracle import check_values, fired, follow, stable_top
from support import make_case

from moram_kernels.aliases import Rule
from moram_kernels.triton_backend.lists_backward import launch_lists_backward
from moram_kernels.triton_backend.rows_backward import launch_rows_backward
from moram_kernels.triton_backend.segments import Table

NAN = float("nan")
F32, BF16 = torch.float32, torch.bfloat16
OUT = 33
# rows, frozen, current, top_k
SIZES = [
    (1, 0, 1, 1),
    (5, 7, 0, 3),
    (20, 20, 13, 8),
    (3, 0, 16, 16),
    (7, 12, 5, 16),
    (3, 100, 9, 31),
]
SIZE = pytest.mark.parametrize("size", SIZES, ids=str)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def scored(size, training, eps=1e-12):
    rows, frozen, current, top_k = size
    num_atoms = frozen + current
    case = make_case(
        rows, (rows,), num_atoms, 0, num_atoms, OUT, top_k=top_k, temperature=0.2, threshold=0.15,
        residual=False, dtype=F32, training=training, eps=eps,
    )  # fmt: skip
    case.x[1::3] = case.x[1::3].round()
    case.x[2::5] = 0
    case = replace(case, keys=torch.eye(num_atoms))
    case.values.copy_(case.values.round())
    case.grad.copy_(case.grad.round())
    return case, stable_top(case.x, min(top_k, num_atoms))


def rule_of(case):
    a = case.activation
    return Rule(a.top_k, a.temperature, 0.0 if case.training else a.threshold, a.eps)


def saved_stats(case, kept):
    """What a forward saves: norm, largest score, 1 / sum of the shares, border value."""
    scores = case.x.double()
    norm, top = scores.norm(dim=-1), scores.amax(-1)
    scale = case.activation.temperature * norm.clamp_min(case.activation.eps)
    share = ((scores - top[:, None]) / scale[:, None]).exp() * kept
    border = scores.masked_fill(~kept, float("inf")).amin(-1)
    return torch.stack([norm, top, 1 / share.sum(-1), border]).float()


def written_by(case, kept):
    """Weighted scores by the published equations: the output where values are the identity."""
    num_atoms = case.x.shape[1]
    probe = replace(case, values=torch.eye(num_atoms), grad=torch.zeros_like(case.x))
    return probe, follow(probe.to(torch.float64), kept, fired(case, kept, None))["output"]


@TRAINING
@SIZE
def test_gradient_of_the_scores_from_saved_scores(size, training):
    rows, frozen, current, _ = size
    case, kept = scored(size, training)
    pull = torch.full((rows, frozen + current + 2), NAN)
    pull[:, :-2] = case.grad @ case.values.T
    saved = torch.full((rows, frozen + current + 5), NAN)
    saved[:, :-5] = case.x
    dscores = torch.full((rows, frozen + current + 1), NAN)
    written = torch.full((rows, current), NAN)
    launch_rows_backward(
        saved, pull[:, :-2], saved_stats(case, kept), dscores[:, :-1], written, frozen,
        rule_of(case),
    )  # fmt: skip
    assert dscores[:, -1].isnan().all()
    compare(case, kept, dscores[:, :-1])
    probe, expected = written_by(case, kept)
    full = expected.float()
    full[:, frozen:] = written
    check_values({"output": full}, probe, kept)


def compare(case, kept, dscores):
    """The gradient of the scores is the oracle's gradient of x; the output has no part in it."""
    output = follow(case.to(torch.float64), kept, fired(case, kept, None))["output"].float()
    check_values({"output": output, "x": dscores}, case, kept)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@TRAINING
@SIZE
def test_gradient_of_the_scores_from_lists(size, training, dtype):
    rows, frozen, current, _ = size
    case, kept = scored(size, training)
    index = kept.nonzero()[:, 1].view(rows, -1).to(torch.int32)
    picked = case.x.gather(1, index.long())
    dlist, factor = torch.full_like(picked, NAN), torch.full((rows,), NAN)
    dscores, written = torch.full((2, rows, current), NAN)
    values = case.values.to(dtype)
    launch_lists_backward(
        case.grad.to(dtype),
        (index, picked),
        saved_stats(case, kept),
        case.x[:, frozen:].contiguous(),
        Table.of(values[:frozen], values[frozen:]),
        dlist,
        factor,
        dscores,
        written,
        rule_of(case),
    )
    spread = torch.zeros_like(case.x).scatter(1, index.long(), dlist)
    every = spread - factor[:, None] * case.x
    compare(case, kept, every)
    assert torch.equal(dscores, every[:, frozen:])
    probe, expected = written_by(case, kept)
    full = expected.float()
    full[:, frozen:] = written
    check_values({"output": full}, probe, kept)


@pytest.mark.parametrize("form", ["scores", "lists"])
def test_where_the_norm_is_clamped_it_has_no_gradient(form):
    case, kept = scored((5, 7, 4, 3), True, eps=100.0)
    pull = case.grad @ case.values.T
    if form == "scores":
        dscores, written = torch.full_like(pull, NAN), torch.full((5, 4), NAN)
        launch_rows_backward(
            case.x, pull, saved_stats(case, kept), dscores, written, 7, rule_of(case)
        )
    else:
        index = kept.nonzero()[:, 1].view(5, -1).to(torch.int32)
        dlist, factor = torch.full((5, 3), NAN), torch.full((5,), NAN)
        table = Table.of(case.values, case.values[:0])
        lists = (index, case.x.gather(1, index.long()))
        launch_lists_backward(
            case.grad, lists, saved_stats(case, kept), None, table, dlist, factor, None, None,
            rule_of(case),
        )  # fmt: skip
        assert (factor == 0).all()
        dscores = torch.zeros_like(pull).scatter(1, index.long(), dlist)
    assert (dscores[~kept] == 0).all()
    compare(case, kept, dscores)


def test_row_that_is_not_finite_stays_alone():
    case, kept = scored((6, 9, 4, 3), True)
    pull = case.grad @ case.values.T
    results = []
    for poison in (False, True):
        scores, stats = case.x.clone(), saved_stats(case, kept)
        if poison:
            scores[2, 4], stats[0, 2] = NAN, NAN
            scores[3, 4], stats[0, 3] = float("inf"), float("inf")
        dscores, written = torch.full_like(pull, 0.0), torch.full((6, 4), 0.0)
        launch_rows_backward(scores, pull, stats, dscores, written, 9, rule_of(case))
        results.append(dscores)
    others = [0, 1, 4, 5]
    assert torch.equal(results[0][others], results[1][others])
    assert not results[1][2:4].isfinite().any()
