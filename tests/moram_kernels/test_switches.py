"""Sizes on each side of every constant by which the torch backend chooses its route.

Each test also proves which route ran, so that a moved constant cannot empty it. All in float64
against the reference; the constants are set small where that makes the test cheap.
"""

from dataclasses import replace

import pytest
import torch
from support import assert_parity, make_case, take_large_routes

from moram_kernels import torch_backend, torch_backward


@pytest.fixture(autouse=True)
def large_routes(monkeypatch):
    take_large_routes(monkeypatch)


def spy(monkeypatch, name, module=torch_backend):
    """What a function of the torch backend returns from now on, call by call."""
    original, answers = getattr(module, name), []

    def watched(*args, **settings):
        answers.append(original(*args, **settings))
        return answers[-1]

    monkeypatch.setattr(module, name, watched)
    return answers


@pytest.fixture(autouse=True)
def small_gather_ratio(monkeypatch):
    """The sizes below are chosen for this one."""
    monkeypatch.setattr(torch_backend, "GATHER_RATIO", 4)


def check_parity(tokens, frozen, current, width=6, top_k=3):
    for training in (True, False):
        settings = {"top_k": top_k, "training": training}
        case = make_case(tokens, (tokens,), frozen, current, width, 5, **settings)
        assert_parity(case)
        assert_parity(case, wanted=("current_keys", "residual") if current else ("residual",))


@pytest.mark.parametrize("current", [0, 4])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_gather_ratio(offset, current, monkeypatch):
    gathers = spy(monkeypatch, "bag")
    check_parity(100, torch_backend.GATHER_RATIO * 3 + offset - current, current)
    assert bool(gathers) == (offset > 0)


@pytest.mark.parametrize("current", [0, 4])
@pytest.mark.parametrize("limit, gathered", [(9999, True), (10000, False), (10001, False)])
def test_dense_macs(limit, gathered, current, monkeypatch):
    # 100 tokens, 20 atoms, 5 outputs: 10000 multiply-adds.
    monkeypatch.setattr(torch_backend, "DENSE_MACS", limit)
    gathers = spy(monkeypatch, "bag")
    check_parity(100, 20 - current, current)
    assert bool(gathers) == gathered


@pytest.mark.parametrize("frozen, current", [(0, 8), (20, 4), (1, 3)])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_few_scores(offset, frozen, current, monkeypatch):
    monkeypatch.setattr(torch_backend, "FEW_SCORES", 70 * (frozen + current) + offset)
    closed_forms = spy(monkeypatch, "backward", torch_backward)
    check_parity(70, frozen, current)
    assert bool(closed_forms) == (offset < 0)


def test_few_scores_of_frozen_atoms_alone_take_the_closed_form(monkeypatch):
    monkeypatch.setattr(torch_backend, "FEW_SCORES", 10**9)
    closed_forms = spy(monkeypatch, "backward", torch_backward)
    check_parity(70, 20, 0)
    assert closed_forms


@pytest.mark.parametrize("current", [0, 4])
@pytest.mark.parametrize("kept", [0, 20, 36, 38, 40, 45])
def test_scores_that_are_kept(kept, current, monkeypatch):
    # Of 40 atoms, all or 36 of them frozen: none, some frozen ones, some current ones, all.
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", kept / 50)
    saved = spy(monkeypatch, "_forward_block")
    check_parity(30, 40 - current, current, width=50)
    found = {block.all_scores.shape[1] for _, block in saved if block is not None}
    assert found == {min(kept, 40)}


@pytest.mark.parametrize("current", [0, 4])
@pytest.mark.parametrize("tokens, used", [(100, True), (33, True), (32, False)])
def test_gram(tokens, used, current, monkeypatch):
    # Nothing kept: F D^2 + M D^2 < 2 M F D for F = 40 and D = 36 from M = 33 on (it is 32.7).
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", 0)
    choices = spy(monkeypatch, "uses_gram")
    check_parity(tokens, 40, current, width=36)
    assert choices and set(choices) == {used}


def test_a_first_task_with_more_atoms_than_features(monkeypatch):
    # All atoms are current: keys^T keys would be of none.
    choices = spy(monkeypatch, "uses_gram")
    check_parity(100, 0, 40, width=6)
    assert choices and not any(choices)


@pytest.mark.parametrize("frozen", [1, 14])
def test_tokens_that_select_current_atoms_alone(frozen, monkeypatch):
    # Few tokens: the two segments are gathered from apart, and one of them has nothing.
    case = make_case(0, (20,), frozen, 20, 6, 5)
    current = torch.cat([case.x[:10], -case.x[:10]]) * 100
    assert_parity(replace(case, current_keys=current))


@pytest.mark.parametrize("tokens, used", [(56, True), (55, False)])
def test_gram_beside_kept_scores(tokens, used, monkeypatch):
    # F D^2 + M D^2 < M (F - 18) D + M F D, that is 1440 < 26 M, for F = 40, D = 36 and 18 kept.
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", 0.5)
    assert torch_backend.uses_gram(tokens, 40, 36) == used


@pytest.mark.parametrize("keep", [0, 1000], ids=["recomputed", "kept"])
@pytest.mark.parametrize("current", [0, 4])
@pytest.mark.parametrize("frozen", [0, 5, 40])
@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 193])
def test_blocks(tokens, frozen, current, keep, monkeypatch):
    if not frozen + current:
        current = 1
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 1)
    monkeypatch.setattr(torch_backend, "KEEP_RATIO", keep)
    blocks = spy(monkeypatch, "_forward_block")
    check_parity(tokens, frozen, current)
    # Four runs in `check_parity`, 64 tokens a block.
    assert len(blocks) == 4 * -(-tokens // 64)
    check_parity(tokens, frozen, current, width=90)


@pytest.mark.parametrize("few", [0, 10**9], ids=["closed-form", "autograd"])
def test_blocks_either_way(few, monkeypatch):
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 1)
    monkeypatch.setattr(torch_backend, "FEW_SCORES", few)
    check_parity(130, 40, 4)


def test_block_of_the_default_size():
    rows = torch_backend.block_rows(5000, 8)
    assert rows == torch_backend.BLOCK_BYTES // 40000 > 64
    for tokens in (rows, rows + 1):
        assert_parity(make_case(7, (tokens,), 5000, 4, 5, 3))


@pytest.mark.parametrize("tokens, single", [(1, True), (2, False)])
def test_single_token(tokens, single, monkeypatch):
    answers = spy(monkeypatch, "forward_one")
    case = make_case(1, (tokens,), 40, 4, 6, 5, training=False)
    with torch.no_grad():
        assert_parity(case, wanted=())
    assert len(answers) == single and all(answer is not None for answer in answers)
    # With a graph to build, the general path runs.
    assert_parity(case)
    assert len(answers) == single


def test_single_token_with_a_tie_at_the_border_takes_the_general_path(monkeypatch):
    answers = spy(monkeypatch, "forward_one")
    case = make_case(1, (1,), 40, 4, 1, 5, training=False, integers=True)
    with torch.no_grad():
        assert_parity(case, wanted=())
    assert answers == [None]
