"""Training on a stream: both methods, the loop they share, and what must stay as it was."""

import re
from dataclasses import replace

import pytest
import torch
from tiny_models import language_model, small_config
from torch import nn
from toy_language import WordTokenizer, encode, learn_stream, toy_stream

from moram import adapters
from moram.layers import LoRALinear
from moram.methods import Method, MoRAM, SequentialLoRA, TrainSettings
from moram.methods.train import TaskTrainer

SETTINGS = TrainSettings(lr=0.02, epochs=4, batch_size=4)
METHODS = ["moram", "lora"]
# 2 layers, rank or atoms 4: q and o are 32 -> 32, k and v 32 -> 16.
TRAINED = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16))


def make_method(name, seed=0):
    if name == "lora":
        return SequentialLoRA(4, seed=seed)
    return MoRAM(small_config(top_k=4, value_scale=8.0, threshold=0.1), seed=seed)


class Watched(MoRAM):
    """Notes each adapter's effective atoms when a task ends."""

    def __init__(self):
        super().__init__(small_config(top_k=4, value_scale=3.0))
        self.ends = []

    def end_task(self, model, index, stage):
        self.ends.append({p: snapshot(a.bank) for p, a in adapters(model).items()})


def snapshot(bank):
    """Copies of all keys and effective values, and how many are frozen."""
    keys, values, current_keys, current_values = bank.segments()
    return (
        torch.cat([keys, current_keys]).detach().clone(),
        torch.cat([values, current_values]).detach().clone(),
        bank.num_frozen,
    )


def learn(method, model=None, settings=SETTINGS, tasks=2):
    return learn_stream(method, language_model() if model is None else model, settings, tasks)


@pytest.mark.parametrize("name", METHODS)
def test_both_methods_train_the_same_number_of_parameters_in_each_task(name):
    result = learn(make_method(name), tasks=3, settings=replace(SETTINGS, epochs=1))
    assert result.trained == [TRAINED] * 3
    # 16 examples in batches of 4.
    assert [len(losses) for losses in result.losses] == [4, 4, 4]


@pytest.mark.parametrize("name", METHODS)
def test_losses_fall_and_the_task_just_trained_is_learned(name):
    # A head that starts at 0.02 is too weak to tell the words apart, and it stays frozen.
    model = language_model(initializer_range=0.15)
    result = learn(make_method(name), model, replace(SETTINGS, epochs=12))
    for losses in result.losses:
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert [result.matrix[t][t] for t in range(2)] == [100.0, 100.0]
    assert max(result.untrained) < 50


def test_frozen_atoms_are_bitwise_unchanged_by_later_tasks():
    model, method = language_model(), Watched()
    learn(method, model, tasks=3)
    last = method.ends[-1]
    assert len(last) == 8
    for t, end in enumerate(method.ends):
        count = 4 * (t + 1)
        for path, (keys, values, frozen) in end.items():
            assert (len(keys), frozen) == (count, count - 4)
            assert torch.equal(last[path][0][:count], keys), (path, t)
            assert torch.equal(last[path][1][:count], values), (path, t)
            assert values[-4:].abs().max() > 0, "each task must have trained its atoms"


def test_a_model_that_is_scored_holds_no_untrained_atoms():
    model, method = language_model(), make_method("moram")
    sizes = []

    def note(module, *_):
        if not module.training:
            sizes.append({a.bank.num_atoms for a in adapters(module).values()})

    model.register_forward_hook(note)
    learn(method, model, tasks=3, settings=replace(SETTINGS, epochs=1))
    # 3 tests of 2 batches each: untrained, then after each task.
    assert sizes == [set()] * 6 + [{4}] * 6 + [{8}] * 6 + [{12}] * 6


@pytest.mark.parametrize("name", METHODS)
def test_the_base_model_is_bitwise_unchanged(name):
    model = language_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learn(make_method(name), model, settings=replace(SETTINGS, epochs=1))
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert before.keys() <= after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def test_sequential_lora_keeps_changing_one_adapter():
    model, ends = language_model(), []

    class WatchedLoRA(SequentialLoRA):
        def end_task(self, model, index, stage):
            layer = model.model.layers[0].self_attn.q_proj
            ends.append(layer.lora_B.detach().clone())

    learn(WatchedLoRA(4), model)
    assert ends[0].abs().max() > 0
    assert not torch.equal(*ends)
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 8


@pytest.mark.parametrize("name", METHODS)
def test_equal_seeds_give_equal_runs(name):
    short = replace(SETTINGS, epochs=1)
    runs = [
        learn(make_method(name, seed), settings=replace(short, seed=order)).losses
        for seed, order in ((1, 2), (1, 2), (3, 2), (1, 4))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2], "the method's seed draws the first keys"
    assert runs[0] != runs[3], "the settings' seed orders the data"


def test_each_task_gets_a_fresh_optimizer_over_the_current_atoms(monkeypatch):
    made = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, parameters, **settings):
            super().__init__(parameters, **settings)
            made.append((self, len(self.state), sum(p.numel() for p in parameters)))

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    learn(make_method("moram"), tasks=3, settings=replace(SETTINGS, epochs=1))
    assert len({id(optimizer) for optimizer, *_ in made}) == 3
    assert [(states, size) for _, states, size in made] == [(0, TRAINED)] * 3
    assert all(len(optimizer.state) == 16 for optimizer, *_ in made)


def test_rate_warms_up_over_a_tenth_and_decays_to_zero(monkeypatch):
    rates = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    settings = replace(SETTINGS, lr=1.0, epochs=5, clip=1e-9)
    learn(make_method("lora"), tasks=1, settings=settings)
    # 20 steps, 2 of warm-up, 18 of decay.
    assert rates == pytest.approx([1 / 2, 1, *(i / 18 for i in range(18, 0, -1))])


def test_task_smaller_than_a_batch_is_refused():
    stream = toy_stream(1, copies=1)
    data = encode(WordTokenizer(), stream[0].train)
    model = language_model()
    message = "a task needs at least batch_size=5 training examples, got 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskTrainer(model, Method(), data, replace(SETTINGS, batch_size=5), 0)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 2.0), (1.5, 0.5)])
def test_lora_layer_is_the_base_plus_scaled_b_a_x(alpha, scale):
    linear = nn.Linear(5, 4)
    layer = LoRALinear(linear, 3, alpha, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_A.abs().max() <= 5**-0.5
    with torch.no_grad():
        layer.lora_B.normal_()
    dense = linear.weight + scale * layer.lora_B @ layer.lora_A
    expected = nn.functional.linear(x, dense, linear.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_lora_layer_keeps_the_dtype_of_a_low_precision_base():
    layer = LoRALinear(nn.Linear(5, 4, dtype=torch.bfloat16), 2)
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_lora_rank_below_one_is_named():
    with pytest.raises(ValueError, match=r"^rank must be >= 1, got 0$"):
        LoRALinear(nn.Linear(5, 4), 0)
