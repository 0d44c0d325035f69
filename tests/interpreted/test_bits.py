"""What a caller of the Triton backend may rely on: the same bits, and empty inputs.

A row gives the same bits alone and in a batch where its tile does not depend on the batch: in the
resident kernel, and in selection from given scores. The other paths do not claim it: tiles and
splits of the score kernel depend on the number of tokens, as the choice of the path itself does.
"""

from dataclasses import replace

import pytest
import torch
from fused_cases import assert_same_bits
from paths import forced
from support import LEAVES, make_case, run, with_spare_rows

from moram_kernels import retrieve
from moram_kernels.aliases import Rule
from moram_kernels.triton_backend.select import launch_select

PATHS = ("resident", "split-dense", "split-gather")


def plain_case(**settings):
    settings = {"top_k": 4, "dtype": torch.float32, **settings}
    return make_case(2, (9,), 20, 5, 64, 32, **settings)


def call(case, backend="triton", **leaves):
    names = ("x", "keys", "values", "current_keys", "current_values", "residual", "num_frozen")
    tensors = {n: getattr(case, n) for n in names} | leaves
    return retrieve(**tensors, activation=case.activation, training=case.training, backend=backend)


def checkpointed(case, path):
    leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in LEAVES}

    def body(*tensors):
        return torch.sin(call(case, **dict(zip(LEAVES, tensors, strict=True))))

    with forced(path):
        output = torch.utils.checkpoint.checkpoint(body, *leaves.values(), use_reentrant=False)
        output.backward(case.grad)
    return {"output": output.detach(), **{n: t.grad for n, t in leaves.items()}}


@pytest.mark.parametrize("path", PATHS)
def test_checkpointing_changes_no_bit(path):
    case = plain_case()
    leaves = {n: getattr(case, n).detach().clone().requires_grad_() for n in LEAVES}
    with forced(path):
        output = torch.sin(call(case, **leaves))
        output.backward(case.grad)
    plain = {"output": output.detach(), **{n: t.grad for n, t in leaves.items()}}
    assert_same_bits(checkpointed(case, path), plain)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_no_bit(path):
    # The bank is float32; x and the residual are what a half-precision model would send.
    case = plain_case()
    case = replace(case, x=case.x.to(torch.bfloat16), residual=case.residual.to(torch.bfloat16))
    case = replace(case, grad=case.grad.to(torch.bfloat16))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), forced(path):
            results.append(run(case, "triton"))
    assert results[0]["output"].dtype == torch.bfloat16
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
def test_two_runs_give_the_same_bits(path, dtype):
    case = plain_case(dtype=dtype)
    with forced(path):
        assert_same_bits(run(case, "triton"), run(case, "triton"))


def test_two_decodes_give_the_same_bits():
    case = plain_case(training=False)
    with forced("decode"):
        assert torch.equal(call(case), call(case))


@pytest.mark.parametrize("frozen", [20, 80], ids=["one-tile", "two-tiles"])
def test_a_resident_row_is_the_same_alone_and_in_a_batch(frozen):
    dtype = torch.bfloat16
    case = make_case(3, (150,), frozen, 5, 64, 32, top_k=8, training=False, dtype=dtype)
    with forced("resident"):
        whole = call(case)
        for row in (0, 1, 63, 64, 149):
            part = slice(row, row + 1)
            alone = call(replace(case, x=case.x[part], residual=case.residual[part]))
            assert torch.equal(alone, whole[part]), row


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "dense"])
@pytest.mark.parametrize("atoms", [25, 300])
def test_selection_from_a_row_is_the_same_alone_and_in_a_batch(atoms, lists):
    scores = torch.randn(70, atoms, generator=torch.Generator().manual_seed(0))
    rule = Rule(8, 0.3, 0.2, 1e-12)

    def select(scores):
        """What is selected, and the stats; of the border value only which scores it separates."""
        rows = len(scores)
        stats = scores.new_empty(4, rows)
        if lists:
            out = (torch.empty(rows, 8, dtype=torch.int32), *torch.empty(2, rows, 8))
            launch_select(scores, rule, lists=out, stats=stats)
        else:
            out = (torch.empty(rows, atoms),)
            launch_select(scores, rule, written=out[0], stats=stats)
        return (*out, stats[:3].T, scores >= stats[3, :, None])

    whole = select(scores)
    for row in (0, 1, 31, 69):
        for one, all_rows in zip(select(scores[row : row + 1]), whole, strict=True):
            assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize("path", PATHS)
def test_a_second_derivative_is_refused(path):
    case = plain_case()
    x = case.x.requires_grad_()
    with forced(path):
        output = call(case, x=x)
        message = 'the Triton backend has no second derivative.*use backend="reference"'
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_give_no_output_and_no_gradient(lead, training):
    case = make_case(2, lead, 20, 5, 64, 32, training=training, dtype=torch.float32)
    results = run(case, "triton")
    assert results["output"].shape == (*lead, 32) and results["x"].shape == (*lead, 64)
    assert results["current_keys"].shape == (5, 64) and not results["current_keys"].any()
    assert results["current_values"].shape == (5, 32) and not results["current_values"].any()


def test_no_output_features_give_no_gradient():
    results = run(make_case(2, (9,), 20, 5, 64, 0, dtype=torch.float32), "triton")
    assert results["output"].shape == (9, 0)
    assert not results["x"].any() and not results["current_keys"].any()


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_a_bank_without_live_atoms_updates_nothing(residual):
    case = make_case(2, (9,), 0, 0, 64, 32, residual=residual, dtype=torch.float32)
    case = with_spare_rows(case, 16)
    leaves = ("x", "residual")
    results = run(case, "triton", leaves)
    expected = run(case, "reference", leaves)
    assert_same_bits(results, expected)
    assert not results["x"].any()
