"""Key protection: what is protected, what stays as it was, and what it is measured on."""

import copy

import pytest
import torch
from tiny_models import language_model, small_config
from torch import nn
from toy_language import WordTokenizer, encode, learn_stream, toy_stream

import moram
from moram import AtomBank, MoRAMConfig, MoRAMLinear, adapters
from moram.methods import MoRAM, TrainSettings
from moram.methods.train import Stage
from moram.sketch import Inputs, InputSketch, owners_of, pack_sketches

SETTINGS = TrainSettings(lr=0.02, epochs=4, batch_size=4)


def protected(**changes):
    settings = {"protect": 0.9, "protect_size": 6, "protect_examples": 8, "threshold": 0.1}
    return MoRAM(small_config(top_k=4, value_scale=8.0, **settings | changes))


def moments_of(stage, found, examples=None):
    """({path: moment}, {path: the first adapter with its input})."""

    def pass_over():
        for _ in stage.losses(examples):
            pass

    inputs = Inputs(stage.model, found, pass_over)
    return dict(inputs.moments()), inputs.leader


def bank_with_atoms(frozen=3, current=2, width=6):
    bank = AtomBank(width, 4, value_scale=2.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    bank.append(frozen, generator)
    with torch.no_grad():
        bank.current_values.normal_(generator=generator)
    bank.grow(current, generator)
    with torch.no_grad():
        bank.current_values.normal_(generator=generator)
    return bank


def orthonormal(count, width):
    q, _ = torch.linalg.qr(torch.randn(width, count, dtype=torch.float64))
    return q.T.contiguous()


def test_guarded_keys_are_blind_to_the_protected_directions_and_scaled_elsewhere():
    bank, basis = bank_with_atoms(), orthonormal(2, 6)
    raw = bank.current_keys.detach().clone()
    bank.guard_keys(basis, 3.0)
    acting = bank.acting_keys()
    inside, outside = torch.randn(5, 2, dtype=torch.float64) @ basis, orthonormal(6, 6)
    torch.testing.assert_close(inside @ acting.T, torch.zeros(5, 2, dtype=torch.float64))
    rest = torch.eye(6, dtype=torch.float64) - sum(torch.outer(row, row) for row in basis)
    torch.testing.assert_close(outside @ acting.T, outside @ (3.0 * rest) @ raw.T)
    assert torch.equal(bank.segments()[2], acting)


@pytest.mark.parametrize("end", ["fold_keys", "freeze", "grow"])
def test_folding_and_freezing_leave_the_acting_keys_as_they_are(end):
    bank = bank_with_atoms()
    bank.guard_keys(orthonormal(2, 6), 3.0)
    expected = torch.cat([bank.frozen_keys[:3], bank.acting_keys()]).detach().clone()
    bank.grow(1) if end == "grow" else getattr(bank, end)()
    keys = torch.cat([bank.segments()[0], bank.segments()[2]])[:5]
    torch.testing.assert_close(keys, expected, rtol=0, atol=0)
    assert bank.guard is None


@pytest.mark.parametrize("sketches", ["float32", False], ids=["guard", "acting keys"])
def test_a_checkpoint_of_guarded_keys_answers_as_the_model_does(tmp_path, sketches):
    model = language_model()
    moram.inject(model, small_config(top_k=4, value_scale=8.0))
    for adapter in adapters(model).values():
        with torch.no_grad():
            adapter.bank.current_values.normal_()
        adapter.bank.guard_keys(orthonormal(2, adapter.in_features).float(), 3.0)
    ids = torch.arange(3, 11)[None]
    expected = model(input_ids=ids).logits
    moram.save(model, tmp_path, sketches=sketches)
    loaded = language_model()
    moram.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    moram.load(model, tmp_path)
    for each in (loaded, model):
        guards = [adapter.bank.guard for adapter in adapters(each).values()]
        assert all((guard is None) == (sketches is False) for guard in guards)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_gradients_of_guarded_keys_reach_the_raw_ones_through_the_projection():
    torch.manual_seed(0)
    base = nn.Linear(6, 4, dtype=torch.float64)
    config = MoRAMConfig(atoms_per_task=3, top_k=2, temperature=0.3, atom_dtype="float64")
    layer = MoRAMLinear.from_linear(base, config)
    with torch.no_grad():
        layer.bank.current_values.normal_()
    basis, x = orthonormal(2, 6), torch.randn(5, 6, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    layer.bank.guard_keys(basis, 3.0)
    with torch.no_grad():
        plain.bank.current_keys.copy_(layer.bank.acting_keys())
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    at_plain = plain.bank.current_keys.grad
    # d/dK of f(g (K - K B^T B)) is g (G - G B^T B), G the gradient at the acting keys.
    expected = 3.0 * (at_plain - at_plain @ basis.T @ basis)
    torch.testing.assert_close(layer.bank.current_keys.grad, expected)


def test_a_sketch_holds_the_moment_of_all_tasks_where_it_has_room():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(20, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    sketch = InputSketch(5)
    for x in inputs:
        sketch.add(x.T @ x)
    expected = sum(x.T @ x for x in inputs)
    torch.testing.assert_close(sketch.rows.T @ sketch.rows, expected)
    torch.testing.assert_close(sketch.total, expected.trace())


def test_the_basis_is_the_fewest_directions_with_that_part_of_the_energy():
    directions = orthonormal(4, 4)
    energies = torch.tensor([6.0, 3.0, 0.8, 0.2], dtype=torch.float64)
    sketch = InputSketch(4)
    sketch.add(directions.T @ (energies[:, None] * directions))
    # Of 10 in all: 6, 9, 9.8, 10.
    for energy, count in ((0.5, 1), (0.7, 2), (0.95, 3), (0.99, 4)):
        basis = sketch.basis(energy)
        assert basis.shape == (count, 4)
        expected = directions[:count]
        torch.testing.assert_close(basis.T @ basis, expected.T @ expected)
    small = InputSketch(2)
    small.add(directions.T @ (energies[:, None] * directions))
    assert small.basis(0.99).shape == (2, 4), "no more than it has room for"


def stage_of(model, task, tokenizer):
    return Stage(model, encode(tokenizer, task.train), SETTINGS)


def test_moments_leave_out_padding_and_are_shared_by_layers_with_one_input():
    model, tokenizer = language_model(), WordTokenizer()
    method = protected()
    method.setup(model)
    found = adapters(model)
    stage = stage_of(model, toy_stream(1)[0], tokenizer)
    _, mask, _ = stage.data.batch(range(8))
    assert (mask == 0).any()
    moments, leader = moments_of(stage, found, 8)
    inputs = {path: [] for path in found}
    hooks = [
        adapter.register_forward_pre_hook(lambda _, x, path=path: inputs[path].append(x[0]))
        for path, adapter in found.items()
    ]
    # A second way: one example at a time, without any padding.
    for row in range(8):
        model(input_ids=torch.tensor([stage.data.ids[row]]))
    for hook in hooks:
        hook.remove()
    for path in found:
        rows = torch.cat([x[0] for x in inputs[path]])
        expected = rows.T @ rows / len(rows)
        torch.testing.assert_close(moments[leader[path]], expected, rtol=1e-4, atol=1e-5)
    attention = "model.layers.0.self_attn"
    assert leader[f"{attention}.k_proj"] == leader[f"{attention}.v_proj"]
    assert leader[f"{attention}.k_proj"] == f"{attention}.q_proj"
    assert leader[f"{attention}.o_proj"] == f"{attention}.o_proj"


def test_new_atoms_score_half_as_high_as_old_ones_on_new_inputs_and_low_on_old_ones():
    model, tokenizer, stream = language_model(), WordTokenizer(), toy_stream(2)
    method = protected(protect=0.999, protect_size=24, protect_examples=16)
    method.setup(model)
    old, new = (stage_of(model, task, tokenizer) for task in stream)
    found = adapters(model)
    method.end_task(model, 0, old)
    method.begin_task(model, 1, new)
    moments, leader = moments_of(new, found)
    before, _ = moments_of(old, found)

    def rms(keys, moment):
        return torch.stack([(key @ moment @ key).clamp_min(0).sqrt() for key in keys]).mean()

    for path, adapter in found.items():
        frozen, _, current, _ = adapter.bank.segments()
        on_new, on_old = moments[leader[path]], before[leader[path]]
        torch.testing.assert_close(rms(current, on_new), 0.5 * rms(frozen, on_new))
        assert rms(current, on_old) < 0.3 * rms(frozen, on_old), path


def test_inputs_inside_the_protected_directions_do_not_blow_up_the_gain():
    model, tokenizer, stream = language_model(), WordTokenizer(), toy_stream(1)
    method = protected(protect=0.999999, protect_size=31, protect_examples=16)
    method.setup(model)
    same = stage_of(model, stream[0], tokenizer)
    method.end_task(model, 0, same)
    # The second task has the very inputs of the first: next to nothing is left outside.
    method.begin_task(model, 1, same)
    gains = [adapter.bank.guard[1] for adapter in adapters(model).values()]
    assert max(gains) == 100.0 and min(gains) > 0


def test_training_keeps_the_projection_and_leaves_plain_keys_behind():
    model, seen = language_model(), []

    class Watched(MoRAM):
        def after_step(self, model, step):
            if step.index:
                for adapter in adapters(model).values():
                    keys, (basis, _) = adapter.bank.acting_keys(), adapter.bank.guard
                    seen.append(((keys @ basis.T).abs().max() / keys.abs().max()).item())

    config = small_config(top_k=4, value_scale=8.0, protect=0.9, protect_size=6)
    method = Watched(config)
    learn_stream(method, model, SETTINGS)
    assert len(seen) == 16 * 8 and max(seen) < 1e-5
    assert all(adapter.bank.guard is None for adapter in adapters(model).values())


def test_without_protection_nothing_is_stored():
    model, method = language_model(), MoRAM(small_config())
    learn_stream(method, model, SETTINGS)
    assert set(method.state_dict()) == {"generator", "learned"}
    assert all(adapter.bank.sketch is None for adapter in adapters(model).values())
    assert method.name == "MoRAM" and protected().name == "MoRAM, protected"


def test_the_first_task_is_learned_as_without_protection():
    losses = [
        learn_stream(method, language_model(), SETTINGS, tasks=1).losses
        for method in (protected(), protected(protect=None))
    ]
    assert losses[0] == losses[1]


def test_layers_share_a_sketch_that_is_one_object_or_has_the_same_numbers():
    def sketch(size=3, scale=1.0, total=5.0):
        return InputSketch(size, scale * torch.eye(2, 4), torch.tensor(total))

    one = sketch()
    found = {"q": one, "k": one, "v": sketch(), "wide": sketch(size=4)}
    # Of one trace, and another trace: no more is alike.
    found |= {"o": sketch(scale=2.0), "up": sketch(total=6.0), "gate": sketch(scale=2.0)}
    expected = {"q": "q", "k": "q", "v": "q", "wide": "wide", "o": "o", "up": "up", "gate": "o"}
    assert owners_of(found) == expected
    empty = {"a": InputSketch(3), "b": InputSketch(3)}
    assert owners_of(empty) == {"a": "a", "b": "b"}
    packed = pack_sketches(found)
    assert packed["owners"] == expected and set(packed["sketches"]) == set(expected.values())
