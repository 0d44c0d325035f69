"""The reference against hand computation, slow plain Python, finite differences, and its limits."""

import math

import pytest
import torch
from support import keep_separated, laid_out, make_case

from moram_kernels import SelfActivation, retrieve
from moram_kernels.reference import (
    mixture_weights,
    normalize_scores,
    retrieve_reference,
    score_atoms,
    select_atoms,
)

LN3 = math.log(3)
# Worked by hand for x = [1, 2]: s = [3, 4, 0], norm 5, z = [0.6, 0.8, 0]; of the best two the
# logits differ by ln 3, so w = [1/4, 3/4, 0].
HAND_X = [[1.0, 2.0]]
HAND_KEYS = [[3.0, 0.0], [0.0, 2.0], [2.0, -1.0]]
HAND_VALUES = [[4.0, 0.0], [0.0, 1.0], [7.0, 7.0]]
HAND_TEMPERATURE = 0.2 / LN3


def slow_update(x, keys, values, activation, training):
    """One token in floats alone, atom by atom: a second derivation of the formula."""
    scores = [math.fsum(a * b for a, b in zip(x, key, strict=True)) for key in keys]
    norm = max(math.sqrt(math.fsum(s * s for s in scores)), activation.eps)
    by_rank = sorted(range(len(keys)), key=lambda i: (-scores[i], i))
    best = by_rank[: activation.top_k]
    shares = {
        i: math.exp((scores[i] - scores[best[0]]) / norm / activation.temperature) for i in best
    }
    update = [0.0] * len(values[0])
    for i in best:
        if not training and activation.threshold > 0 and scores[i] / norm < activation.threshold:
            continue
        weight = shares[i] / math.fsum(shares.values())
        for o, value in enumerate(values[i]):
            update[o] += weight * scores[i] * value
    return update


def tensor64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, tensor64(expected), rtol=tolerance, atol=tolerance)


def hand_call(backend, threshold=0.0, training=True, residual=None, leaves=()):
    x, keys, values = (tensor64(rows) for rows in (HAND_X, HAND_KEYS, HAND_VALUES))
    none = torch.empty(0, 2, dtype=torch.float64)
    for name, tensor in (("x", x), ("keys", keys), ("values", values)):
        tensor.requires_grad_(name in leaves)
    output = retrieve(
        x,
        none,
        none,
        SelfActivation(2, HAND_TEMPERATURE, threshold),
        current_keys=keys,
        current_values=values,
        residual=residual,
        training=training,
        backend=backend,
    )
    return output, x, keys, values


@pytest.mark.parametrize("backend", ["reference", "torch"])
class TestByHand:
    """Literal numbers; see the constants above for the weights."""

    def test_update(self, backend):
        assert_close(hand_call(backend)[0], [[3.0, 3.0]])

    def test_residual_is_added(self, backend):
        assert_close(hand_call(backend, residual=tensor64([[10.0, 20.0]]))[0], [[13.0, 23.0]])

    def test_threshold_cuts_without_renormalising(self, backend):
        # 0.7 lies between 0.6 and 0.8: atom 0 falls silent, atom 1 keeps its 3/4.
        assert_close(hand_call(backend, threshold=0.7, training=False)[0], [[0.0, 3.0]])

    def test_threshold_is_off_in_training(self, backend):
        assert_close(hand_call(backend, threshold=0.7, training=True)[0], [[3.0, 3.0]])

    def test_threshold_above_every_score_leaves_nothing(self, backend):
        assert_close(hand_call(backend, threshold=0.9, training=False)[0], [[0.0, 0.0]])

    def test_gradients(self, backend):
        output, x, keys, values = hand_call(backend, leaves=("x", "keys", "values"))
        output.backward(tensor64([[1.0, 0.0]]))
        # g = [4, 0, 7]; ds = w g + dz / 5 - s <z, dz> / 25 with dz = 11.25 ln 3 [1, -1, 0].
        ds = [1 + 2.52 * LN3, -1.89 * LN3, 0.0]
        assert_close(x.grad, [[3 * ds[0], 2 * ds[1]]])
        assert_close(keys.grad, [[d, 2 * d] for d in ds])
        assert_close(values.grad, [[0.75, 0.0], [3.0, 0.0], [0.0, 0.0]])

    def test_gradients_below_the_threshold_are_zero(self, backend):
        output, x, keys, values = hand_call(
            backend, threshold=0.7, training=False, leaves=("x", "keys", "values")
        )
        output.backward(tensor64([[1.0, 0.0]]))
        # Atom 1 alone writes, and only along [0, 1], which this gradient does not see.
        assert_close(x.grad, [[0.0, 0.0]])
        assert_close(keys.grad, [[0.0, 0.0]] * 3)
        assert_close(values.grad, [[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.99])
@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (5, 7, 3, 2), (9, 2, 5, 4), (13, 17, 11, 6)],
    ids=lambda s: "M{}-N{}-D{}-O{}-fp64".format(*s),
)
def test_reference_equals_a_plain_python_loop(shape, integers, threshold, training):
    tokens, atoms, width, out = shape
    for top_k in (1, 3, 8):
        case = make_case(
            top_k, (tokens,), atoms, 0, width, out, threshold=threshold, integers=integers
        )
        activation = SelfActivation(top_k, 0.1, threshold)
        update = retrieve_reference(case.x, case.keys, case.values, activation, None, training)
        bank = case.keys.tolist(), case.values.tolist()
        expected = [slow_update(row, *bank, activation, training) for row in case.x.tolist()]
        assert_close(update, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("eps", [1e-12, 10.0], ids=["norm", "clamped"])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_reference_gradient_equals_finite_differences(top_k, eps, training):
    case = make_case(4, (24,), 7, 0, 5, 3, top_k=top_k, eps=eps, threshold=0.1)
    case = keep_separated(case, 4, margin=0.01)
    leaves = [t.requires_grad_() for t in (case.x, case.keys, case.values, case.residual)]

    def call(x, keys, values, residual):
        return retrieve_reference(x, keys, values, case.activation, residual, training)

    assert torch.autograd.gradcheck(call, leaves)


def test_reference_has_a_second_derivative():
    case = keep_separated(make_case(5, (12,), 5, 0, 4, 2, top_k=2), 3, margin=0.01)
    leaves = [t.requires_grad_() for t in (case.x, case.keys, case.values)]
    assert torch.autograd.gradgradcheck(
        lambda *args: retrieve_reference(*args, case.activation, None, True), leaves
    )


def test_large_temperature_is_lora_with_every_atom_weighted_one_over_n():
    case = make_case(6, (11,), 13, 0, 7, 5)
    activation = SelfActivation(top_k=13, temperature=1e6, threshold=0.0)
    update = retrieve_reference(case.x, case.keys, case.values, activation)
    expected = (case.x @ case.keys.T @ case.values) / 13
    # Logits are at most 1e-6 apart, so weights are within 1e-6 of 1/13.
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-5)


def test_small_temperature_is_the_best_atom_alone():
    case = keep_separated(make_case(7, (60,), 13, 0, 7, 5, top_k=1), 11, margin=0.01)
    activation = SelfActivation(top_k=13, temperature=1e-5, threshold=0.0)
    update = retrieve_reference(case.x, case.keys, case.values, activation)
    scores, best = (case.x @ case.keys.T).max(dim=-1, keepdim=True)
    torch.testing.assert_close(update, scores * case.values[best.squeeze(-1)], rtol=0, atol=1e-12)


def test_threshold_zero_equals_no_threshold():
    case = make_case(8, (11,), 13, 0, 7, 5)
    activation = SelfActivation(13, 0.3, 0.0)
    args = (case.x, case.keys, case.values, activation, None)
    # Negative scores are selected too (top_k = N), and 0 must not cut them.
    assert (case.x @ case.keys.T < 0).any()
    assert torch.equal(retrieve_reference(*args, False), retrieve_reference(*args, True))


def test_norm_scores_have_unit_length_over_the_atoms():
    norm_scores = normalize_scores(tensor64([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]))
    assert_close(norm_scores, [[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]])


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.99])
def test_weights_sum_to_one_in_training_and_to_at_most_one_at_inference(threshold):
    case = make_case(9, (50,), 17, 0, 7, 5)
    activation = SelfActivation(5, 0.1, threshold)
    norm_scores = normalize_scores(score_atoms(case.x, case.keys))
    selected = select_atoms(norm_scores, 5)
    trained = mixture_weights(norm_scores, selected, activation, training=True)
    inferred = mixture_weights(norm_scores, selected, activation, training=False)
    assert_close(trained.sum(-1), [1.0] * 50)
    assert (trained >= 0).all() and (inferred >= 0).all()
    assert (inferred.sum(-1) <= 1 + 1e-12).all()
    cut = (norm_scores < threshold) & (threshold > 0)
    assert torch.equal(inferred, trained.masked_fill(cut, 0.0))


def test_of_equal_scores_the_lowest_index_wins():
    scores = tensor64([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    expected = [[False, True, True, False, False], [True, True, False, False, False]]
    assert select_atoms(scores, 2).tolist() == expected


def test_selection_is_signed_not_by_absolute_value():
    assert select_atoms(tensor64([[-9.0, 1.0, -2.0]]), 2).tolist() == [[False, True, True]]


@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize("atoms", [1, 3, 8, 17])
def test_exactly_min_top_k_and_n_atoms_are_selected(atoms, integers):
    case = make_case(10, (40,), atoms, 0, 3, 2, integers=integers)
    for top_k in (1, 2, 8, 100):
        selected = select_atoms(score_atoms(case.x, case.keys), top_k)
        assert selected.sum(-1).tolist() == [min(top_k, atoms)] * 40


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_zero_input_gives_zero_update_and_finite_gradients(tokens, dtype, backend, route):
    case = make_case(11, (tokens,), 40, 4, 6, 3, top_k=4, dtype=dtype)
    x = torch.zeros_like(case.x).requires_grad_()
    bank = [t.detach().requires_grad_() for t in (case.current_keys, case.current_values)]
    output = retrieve(
        x,
        case.keys,
        case.values,
        SelfActivation(4),
        current_keys=bank[0],
        current_values=bank[1],
        training=True,
        backend=backend,
    )
    assert torch.equal(output, torch.zeros(tokens, 3, dtype=dtype))
    output.backward(laid_out(case.grad, "expanded"))
    # All scores tie at 0: the first four atoms, all frozen, weigh 1/4 each; s = 0 and x = 0 leave
    # nothing for the bank.
    pull = case.grad[0].double() @ case.values[:4].double().T / 4
    expected = (pull @ case.keys[:4].double()).expand(tokens, -1)
    torch.testing.assert_close(
        x.grad.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max()
    )
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in bank)


def test_half_inputs_are_scored_in_float32():
    # bfloat16 has no 257: a score summed or rounded there would be 256.
    x = torch.ones(1, 257, dtype=torch.bfloat16)
    scores = score_atoms(x, torch.ones(1, 257, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and scores.item() == 257.0
