"""Acceptance checks 1 to 4 of the MoRAM layer, against formulas written out in plain Python."""

import math

import pytest
import torch

from moram import MoRAMConfig, MoRAMLinear

D, OUT, M = 12, 7, 9
SCALE = 2.5


def make_layer(tasks=2, seed=0, **settings):
    """A float64 layer after some tasks, and all its keys and effective values as lists drawn here.

    Values are random in every task, as if trained; value_scale is applied by hand.
    """
    defaults = {"atoms_per_task": 3, "top_k": 4, "temperature": 0.2, "threshold": 0.0}
    config = MoRAMConfig(**(defaults | {"value_scale": SCALE, "atom_dtype": "float64"} | settings))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = MoRAMLinear(D, OUT, config=config, dtype=torch.float64, generator=generator)
    keys, values = [], []
    for task in range(tasks):
        if task:
            layer.bank.grow(config.atoms_per_task, generator)
        drawn = [
            torch.randn(config.atoms_per_task, width, generator=generator, dtype=torch.float64)
            for width in (D, OUT)
        ]
        with torch.no_grad():
            layer.bank.current_keys.copy_(drawn[0])
            layer.bank.current_values.copy_(drawn[1])
        keys.append(drawn[0])
        values.append(drawn[1] * config.value_scale)
    return layer, torch.cat(keys), torch.cat(values)


def make_inputs(seed=5):
    return torch.randn(M, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_by_hand(scores, top_k, temperature, threshold):
    """Mixture weights of one token from its raw scores, in Python floats."""
    norm = max(math.sqrt(sum(s * s for s in scores)), 1e-12)
    normed = [s / norm for s in scores]
    chosen = sorted(range(len(scores)), key=lambda i: -normed[i])[:top_k]
    powers = {i: math.exp((normed[i] - normed[chosen[0]]) / temperature) for i in chosen}
    total = sum(powers.values())
    return [
        powers[i] / total if i in powers and normed[i] >= threshold else 0.0
        for i in range(len(scores))
    ]


def update_by_hand(x, keys, values, top_k, temperature, threshold=-1.0):
    """The update of every token, atom by atom; a threshold of -1 cuts nothing."""
    rows = []
    for token in x.tolist():
        scores = [sum(a * b for a, b in zip(key, token, strict=True)) for key in keys.tolist()]
        weights = weights_by_hand(scores, top_k, temperature, threshold)
        rows.append(
            [
                sum(w * s * v[o] for w, s, v in zip(weights, scores, values.tolist(), strict=True))
                for o in range(values.shape[1])
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def base_output(layer, x):
    return x @ layer.weight.T + layer.bias


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_atoms_at_a_huge_temperature_are_lora_over_n(training):
    layer, keys, values = make_layer(top_k=6, temperature=1e13)
    x = make_inputs().requires_grad_()
    lora = {"x": x.detach().clone(), "keys": keys.clone(), "values": values.clone()}
    for leaf in lora.values():
        leaf.requires_grad_()
    expected = base_output(layer, lora["x"]) + (lora["x"] @ lora["keys"].T) @ lora["values"] / 6

    output = layer.train(training)(x)

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(M, OUT, dtype=torch.float64)
    output.backward(grad)
    expected.backward(grad)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(x.grad, lora["x"].grad, **close)
    torch.testing.assert_close(layer.bank.current_keys.grad, lora["keys"].grad[3:], **close)
    torch.testing.assert_close(
        layer.bank.current_values.grad, SCALE * lora["values"].grad[3:], **close
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tiny_temperature_is_the_single_best_atom(training):
    layer, keys, values = make_layer(top_k=6, temperature=1e-7)
    x = make_inputs()
    best = [max(range(6), key=lambda i, row=row: row[i]) for row in (x @ keys.T).tolist()]
    assert len(set(best)) > 2, "the tokens should not all prefer one atom"
    update = torch.stack([(x[m] @ keys[i]) * values[i] for m, i in enumerate(best)])
    output = layer.train(training)(x)
    torch.testing.assert_close(output, base_output(layer, x) + update, rtol=1e-9, atol=1e-9)


def test_top_k_of_one_is_the_single_best_atom_at_any_temperature():
    layer, keys, values = make_layer(top_k=1, temperature=50.0)
    x = make_inputs()
    best = (x @ keys.T).argmax(-1)
    update = (x * keys[best]).sum(-1, keepdim=True) * values[best]
    torch.testing.assert_close(layer(x), base_output(layer, x) + update, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("top_k", [1, 2, 5, 9, 40])
@pytest.mark.parametrize("tasks", [1, 3])
def test_layer_equals_the_published_equations(top_k, tasks):
    layer, keys, values = make_layer(tasks=tasks, top_k=top_k)
    x = make_inputs()
    expected = base_output(layer, x) + update_by_hand(x, keys, values, top_k, 0.2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_task_starts_at_the_base_output(training):
    layer = MoRAMLinear(D, OUT, config=MoRAMConfig.preset("xtail")).train(training)
    x = make_inputs().float()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_freezing_alone_changes_nothing(training, tasks):
    layer, _, _ = make_layer(tasks=tasks, threshold=0.3)
    layer.train(training)
    x = make_inputs()
    before = layer(x).detach()
    assert not torch.allclose(before, base_output(layer, x)), "the atoms must matter"
    layer.bank.freeze()
    assert layer.bank.num_current == 0
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 6])
def test_appending_fresh_atoms_changes_the_output(top_k):
    layer, keys, values = make_layer(top_k=top_k)
    x = make_inputs()
    before = layer(x).detach()
    layer.bank.grow(3, torch.Generator().manual_seed(9))
    fresh = layer.bank.current_keys.detach()
    after = layer(x).detach()
    assert (after - before).abs().max() > 1e-2
    expected = update_by_hand(
        x, torch.cat([keys, fresh]), torch.cat([values, torch.zeros(3, OUT)]), top_k, 0.2
    )
    torch.testing.assert_close(after, base_output(layer, x) + expected, rtol=1e-10, atol=1e-10)


def test_frozen_atoms_get_no_gradient_and_no_optimizer_state():
    layer, keys, values = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    weight = layer.weight.detach().clone()
    layer(make_inputs()).square().sum().backward()
    optimizer.step()

    bank = layer.bank
    trained = {id(bank.current_keys), id(bank.current_values)}
    assert {id(p) for p in optimizer.state} == trained
    assert {id(p) for p in layer.parameters() if p.grad is not None} == trained
    assert torch.equal(bank.frozen_keys[:3], keys[:3])
    assert torch.equal(bank.frozen_values[:3], values[:3])
    assert not bank.frozen_keys.requires_grad and not bank.frozen_values.requires_grad
    assert torch.equal(layer.weight, weight)
    assert (bank.current_keys != keys[3:]).all()


@pytest.mark.parametrize("num_frozen", [0, 3])
def test_current_keys_outside_the_top_k_get_a_gradient_through_the_norm(num_frozen):
    layer, keys, values = make_layer(tasks=1 + num_frozen // 3, top_k=2)
    x = make_inputs()[:1]
    scores = (x @ keys.T)[0]
    chosen = scores.sort(descending=True).indices[:2].tolist()
    outside = [i for i in range(num_frozen, len(keys)) if i not in chosen]
    assert outside, "the case must have a current atom outside the top 2"

    layer.train()(x).sum().backward()

    # d update / d s_j for j outside S: only z_i = s_i / |s| of the selected i depends on it.
    norm = scores.norm()
    z = scores / norm
    weights = torch.tensor(weights_by_hand(scores.tolist(), 2, 0.2, -1.0), dtype=torch.float64)
    gains = scores * values.sum(-1)
    mean = (weights * gains).sum()
    dz = weights * (gains - mean) / 0.2
    for j in outside:
        expected = -(dz[chosen] * z[chosen]).sum() * z[j] / norm * x[0]
        assert expected.norm() > 1e-3
        actual = layer.bank.current_keys.grad[j - num_frozen]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        assert (layer.bank.current_values.grad[j - num_frozen] == 0).all()


def test_threshold_cuts_in_eval_and_not_in_training():
    layer, keys, values = make_layer(threshold=0.4)
    x = make_inputs()
    uncut = base_output(layer, x) + update_by_hand(x, keys, values, 4, 0.2)
    cut = base_output(layer, x) + update_by_hand(x, keys, values, 4, 0.2, threshold=0.4)
    assert (uncut - cut).abs().max() > 0.1, "the threshold must cut something"
    torch.testing.assert_close(layer.train()(x), uncut, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), cut, rtol=1e-10, atol=1e-10)


def test_weights_are_not_renormalised_after_the_threshold():
    layer, keys, _ = make_layer(threshold=0.4)
    x = make_inputs()
    weights = layer.mixture_weights(x)
    expected = [weights_by_hand(row, 4, 0.2, 0.4) for row in (x @ keys.T).tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    sums = weights.sum(-1)
    assert (sums <= 1 + 1e-12).all()
    assert ((sums > 0) & (sums < 0.999)).any(), "some token must lose a part of its weight"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_input_gives_the_bias_and_no_nan(training):
    layer, _, _ = make_layer(threshold=0.2)
    x = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    output = layer.train(training)(x)
    torch.testing.assert_close(output, layer.bias.expand(2, OUT), rtol=0, atol=0)
    output.sum().backward()
    for grad in (x.grad, layer.bank.current_keys.grad, layer.bank.current_values.grad):
        assert torch.isfinite(grad).all()


def test_output_is_the_base_when_every_atom_is_cut():
    layer, _, _ = make_layer(threshold=0.999)
    x = make_inputs()
    assert (layer.eval().mixture_weights(x) == 0).all()
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.allclose(layer.train()(x), layer.base_layer(x))
