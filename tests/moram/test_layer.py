"""`MoRAMLinear` as a drop-in `nn.Linear`: what it looks like, takes, returns and refuses."""

import copy
import re

import pytest
import torch
from tiny_models import fill_values, language_model, small_config, token_ids
from torch import nn

import moram
from moram import MoRAMConfig, MoRAMLinear
from moram.layers import LoRALinear

D, OUT = 6, 4


def make_layer(tasks=2, seed=0, **settings):
    """A float32 layer after some tasks, all values random."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer = MoRAMLinear(D, OUT, config=small_config(**settings), generator=generator)
    for task in range(tasks):
        if task:
            layer.bank.grow(layer.config.atoms_per_task, generator)
        with torch.no_grad():
            layer.bank.current_values.normal_(generator=generator)
    return layer


def make_inputs(*lead, width=D):
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(2))


def test_layer_shows_the_attributes_of_its_linear():
    linear = nn.Linear(D, OUT)
    layer = MoRAMLinear.from_linear(linear)
    assert layer.base_layer is linear
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (D, OUT)
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert layer.bank.current_keys.requires_grad and layer.bank.current_values.requires_grad


def test_built_layer_has_the_arguments_of_linear():
    layer = MoRAMLinear(D, OUT, bias=False, device="meta", dtype=torch.bfloat16)
    assert layer.bias is None
    assert layer.weight.shape == (OUT, D) and layer.weight.dtype == torch.bfloat16
    assert layer.weight.device.type == layer.bank.current_keys.device.type == "meta"


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions_are_kept(lead):
    layer, x = make_layer(), make_inputs(*lead)
    output = layer(x)
    assert output.shape == (*lead, OUT)
    rows = [layer(row[None])[0] for row in x.reshape(-1, D)]
    expected = torch.stack(rows) if rows else torch.empty(0, OUT)
    torch.testing.assert_close(output.reshape(-1, OUT), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_base(dtype):
    layer = MoRAMLinear(D, OUT, config=small_config(), dtype=dtype)
    assert layer.bank.current_keys.dtype == torch.float32
    x = make_inputs(3).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    with torch.no_grad():
        layer.bank.current_values.normal_()
    assert layer(x).dtype == dtype
    assert not torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_atoms_have_the_dtype_of_the_config(name):
    layer = MoRAMLinear(D, OUT, config=small_config(atom_dtype=name))
    assert {t.dtype for t in layer.bank.segments()} == {getattr(torch, name)}
    assert layer(make_inputs(2)).dtype == torch.float32


@pytest.mark.parametrize(("capacity", "expected"), [(None, 32), (0, 0), (5, 5)])
def test_bank_has_room_for_eight_tasks_or_the_given_capacity(capacity, expected):
    assert MoRAMLinear(D, OUT, config=small_config(capacity=capacity)).bank.capacity == expected


class Conv1D(nn.Module):
    """Named like GPT-2's layer."""


REFUSED = {
    "conv1d": (
        Conv1D,
        "Conv1D (GPT-2) stores its weight transposed and is not supported",
    ),
    "adapted": (
        lambda: MoRAMLinear(D, OUT),
        "it is already adapted (MoRAMLinear); eject the adapters first",
    ),
    "lora": (
        lambda: LoRALinear(nn.Linear(D, OUT), 2),
        "it is already adapted (LoRALinear); eject the adapters first",
    ),
    "out_proj": (
        lambda: nn.MultiheadAttention(D, 1).out_proj,
        "it belongs to an nn.MultiheadAttention, which reads its weight and never calls it; "
        "split the attention first (moram.models.split_attention)",
    ),
    "norm": (
        lambda: nn.LayerNorm(D),
        "got LayerNorm, which lacks in_features, out_features or weight",
    ),
    "tensor": (lambda: torch.zeros(D, OUT), "got Tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_linear_is_refused(case):
    build, reason = REFUSED[case]
    message = f"base_layer must be a Linear: {reason}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        MoRAMLinear.from_linear(build())


def test_config_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match=r"^config must be a MoRAMConfig, got dict$"):
        MoRAMLinear(D, OUT, config={"top_k": 2})


def test_input_of_the_wrong_width_is_refused():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(2x7 and 6x4\)"):
        make_layer()(torch.zeros(2, D + 1))


def test_unavailable_triton_is_one_clear_error():
    layer = MoRAMLinear(D, OUT, backend="triton")
    with pytest.raises(
        RuntimeError, match=r'^backend="triton" cannot run: there is no .* GPU here'
    ):
        layer(make_inputs(2))


def test_backend_argument_wins_over_the_config():
    layer = MoRAMLinear(D, OUT, config=MoRAMConfig(backend="triton"), backend="torch")
    assert torch.equal(layer(make_inputs(2)), layer.base_layer(make_inputs(2)))


def test_reference_and_torch_backends_agree():
    layer, x = make_layer(), make_inputs(9)
    outputs = []
    for backend in ("reference", "torch"):
        layer.configure(layer.config, backend)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_empty_bank_returns_the_base():
    linear, x = nn.Linear(D, OUT), make_inputs(3)
    layer = MoRAMLinear.from_linear(linear, small_config())
    other = moram.AtomBank(D, OUT)
    layer.bank.load_state_dict(other.state_dict())
    assert layer.bank.num_atoms == 0
    assert torch.equal(layer(x), linear(x))
    assert layer.mixture_weights(x).shape == (3, 0)


def test_dropout_acts_in_training_alone_and_spares_the_base():
    layer, plain, x = make_layer(dropout=0.5), make_layer(), make_inputs(40)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    layer.train()
    outputs = [layer(x) for _ in range(2)]
    assert not torch.equal(*outputs)
    with torch.no_grad():
        layer.bank.current_values.zero_()
        layer.bank.frozen_values.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("top_k", "threshold"), [(1, 0.0), (3, 0.0), (20, 0.0), (1, 0.7), (3, 0.45), (20, 0.45)]
)
def test_mixture_weights_agree_with_an_independent_computation(top_k, threshold):
    layer = make_layer(threshold=threshold, top_k=top_k)
    x = make_inputs(2, 5)
    weights = layer.mixture_weights(x)
    assert weights.shape == (2, 5, 8)
    keys = torch.cat([layer.bank.frozen_keys[:4], layer.bank.current_keys]).detach().double()
    for token, actual in zip(x.reshape(-1, D), weights.reshape(-1, 8), strict=True):
        scores = keys @ token.double()
        normed = scores / scores.square().sum().sqrt()
        cut = normed.sort().values[-min(top_k, 8)]
        powers = torch.where(normed >= cut, (normed / 0.3).exp(), 0.0)
        expected = powers / powers.sum() * (normed >= threshold if threshold else 1)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    sums = weights.sum(-1)
    assert (sums <= 1 + 1e-6).all()
    if threshold:
        assert sums.min() < 0.99
    else:
        torch.testing.assert_close(sums, torch.ones(2, 5))


def test_mixture_weights_are_those_of_eval_mode_and_carry_no_gradient():
    layer, x = make_layer(threshold=0.45), make_inputs(5)
    assert torch.equal(layer.train().mixture_weights(x), layer.eval().mixture_weights(x))
    assert not layer.mixture_weights(x).requires_grad


@pytest.mark.parametrize("tasks", [1, 3])
def test_state_dict_loads_into_a_layer_of_another_size(tasks):
    layer, x = make_layer(), make_inputs(5)
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        *(f"bank.{a}_{b}" for a in ("frozen", "current") for b in ("keys", "values")),
        "bank.live",
    }
    other = make_layer(tasks=tasks, seed=3, atoms_per_task=5, capacity=1)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_state_dict_of_a_whole_model_loads_strictly_into_another_size():
    model, other, ids = language_model(), language_model(seed=1), token_ids()
    for each in (model, other):
        moram.inject(each, small_config())
    for task in range(3):
        if task:
            moram.grow(model)
        fill_values(model, task)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_deepcopy_is_independent():
    layer, x = make_layer(), make_inputs(4)
    before, twin = layer(x), copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    twin.bank.grow(4)
    with torch.no_grad():
        twin.base_layer.weight.zero_()
        twin.bank.frozen_values.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


def test_layer_trains_the_atoms_to_a_target():
    layer = make_layer(tasks=2, top_k=8).train()
    x, y = make_inputs(16), make_inputs(16, width=OUT)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
