"""The short way of one token at inference: the same numbers, and where it is not taken."""

from functools import partial

import pytest
import torch
from support import make_case, take_large_routes

from moram import MoRAMConfig, MoRAMLinear
from moram.layers import moram as layer_file
from moram_kernels import SelfActivation, torch_backend
from moram_kernels.api import retrieve_one, rule_of
from moram_kernels.reference import retrieve_reference


def arguments(frozen=20, current=4, lead=(1, 1), seed=0, **settings):
    case = make_case(seed, lead, frozen, current, 12, 7, **settings).to(torch.float32)
    bank = (case.keys, case.values, case.current_keys, case.current_values)
    return case.x, bank, case.activation, case.residual


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("frozen, current", [(20, 4), (0, 4), (3, 3), (0, 12)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_operator(frozen, current, training, threshold):
    for seed in range(5):
        x, bank, activation, residual = arguments(
            frozen, current, seed=seed, threshold=threshold, top_k=3
        )
        kept = residual.clone()
        with torch.no_grad():
            found = retrieve_one(x, bank, activation, residual, training, "auto")
        keys, values = torch.cat([bank[0], bank[2]]), torch.cat([bank[1], bank[3]])
        high = [t.double() for t in (x, keys, values)]
        expected = retrieve_reference(*high, activation, residual.double(), training)
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
        assert torch.equal(residual, kept) and found.data_ptr() != residual.data_ptr()


def test_it_leaves_to_others_what_it_cannot_do():
    x, bank, activation, residual = arguments()
    call = partial(retrieve_one, x, bank, activation, residual, False)
    assert call("auto") is None, "a graph may be wanted"
    with torch.no_grad():
        assert call("reference") is None and call("triton") is None
        with torch.autocast("cpu", torch.bfloat16):
            assert call("auto") is None
        low = [t.to(torch.bfloat16) for t in bank]
        assert retrieve_one(x, low, activation, residual, False, "auto") is None
        assert torch.vmap(lambda x: x + (call("auto") is None))(torch.zeros(2)).tolist() == [1, 1]
        assert call("torch") is not None


@pytest.mark.parametrize("backend, taken", [("auto", 3), ("torch", 3), ("reference", 0)])
def test_a_layer_takes_it_for_one_token_at_inference(backend, taken, monkeypatch):
    answers = []
    original = layer_file.retrieve_one

    def watched(*args):
        answers.append(original(*args))
        return answers[-1]

    monkeypatch.setattr(layer_file, "retrieve_one", watched)
    layer = MoRAMLinear(6, 5, config=MoRAMConfig(threshold=0.0), backend=backend).eval()
    torch.nn.init.normal_(layer.bank.current_values)
    x = torch.randn(2, 6)
    both = layer(x).detach()
    with torch.no_grad():
        for lead in ((6,), (1, 6), (1, 1, 6)):
            found = layer(x[1].view(lead))
            assert found.shape == (*lead[:-1], 5)
            torch.testing.assert_close(found.view(-1), both[1])
    assert sum(answer is not None for answer in answers) == taken


def test_any_order_of_the_largest_scores_gives_the_same_selection(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-4, 5, (50, 30), generator=generator).double()
    scores[:25] += torch.rand(25, 30, generator=generator, dtype=torch.float64)
    expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :6].sort(dim=-1).values
    topk = torch.Tensor.topk

    def flipped(self, *args, **settings):
        return tuple(part.flip(-1) for part in topk(self, *args, **settings))

    for other in (topk, flipped):
        monkeypatch.setattr(torch.Tensor, "topk", other)
        found, index = torch_backend._select(scores, 6)
        assert torch.equal(index.sort(dim=-1).values, expected)
        assert torch.equal(found, scores.gather(1, index))


def test_an_atom_that_no_token_selects_may_be_infinite_where_rows_are_gathered(monkeypatch):
    take_large_routes(monkeypatch)
    x, bank, _, residual = arguments(40, 4, (9,))
    activation = SelfActivation(2, 0.03, 0.0)
    with torch.no_grad():
        call = partial(torch_backend.forward, settings=rule_of(activation), training=True)
        expected = call(x, *bank, residual, save=False)[0]
        used = torch_backend.forward(x, *bank, residual, rule_of(activation), True, True)[1].index
        for atom in sorted(set(range(40)) - set(used.flatten().tolist())):
            values = bank[1].clone()
            values[atom] = float("inf")
            found = call(x, bank[0], values, *bank[2:], residual, save=False)[0]
            assert torch.equal(found, expected)
