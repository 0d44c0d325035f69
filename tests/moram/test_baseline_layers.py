"""The layers of the baselines: what they compute, and what growing and merging leaves alone."""

import math

import pytest
import torch
from test_baselines import fill
from torch import nn

from moram.layers import CoDyRALinear, LoRALinear, MoELoRALinear, StackedLoRALinear


@pytest.mark.parametrize("kind", [LoRALinear, StackedLoRALinear, MoELoRALinear, CoDyRALinear])
def test_float32_adapters_work_beside_a_bfloat16_base(kind):
    layer = kind(nn.Linear(5, 4, dtype=torch.bfloat16), 2, dropout=0.5).eval()
    x = torch.ones(2, 3, 5, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base_layer(x))
    fill(layer.lora_B)
    assert {p.dtype for n, p in layer.named_parameters() if "base" not in n} == {torch.float32}
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x)), "dropout must act in training"
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        kind(nn.Linear(5, 4), 2, dropout=1.0)


def test_a_stack_adds_up_all_tasks_or_applies_the_selected_one():
    layer = StackedLoRALinear(nn.Linear(5, 4, dtype=torch.float64), 2, 6, dtype=torch.float64)
    pairs = []
    for task in range(3):
        if task:
            layer.grow()
            assert layer.lora_B.abs().max() == 0
        fill(layer.lora_B)
        pairs.append((layer.lora_A.detach().clone(), layer.lora_B.detach().clone()))
    x = torch.randn(7, 5, dtype=torch.float64)
    updates = [3 * x @ down.T @ up.T for down, up in pairs]
    base = layer.base_layer(x)
    torch.testing.assert_close(layer(x), base + sum(updates))
    layer.separate = True
    torch.testing.assert_close(layer(x), base + updates[2])
    for task, update in enumerate(updates):
        layer.selected = task
        torch.testing.assert_close(layer(x), base + update)


def test_moe_gate_is_the_softmax_of_the_top_k_and_weights_the_experts():
    layer = MoELoRALinear(nn.Linear(3, 4), 4, 2, experts=2, top_k=2)
    fill(layer.lora_B)
    layer.grow()
    fill(layer.lora_B)
    with torch.no_grad():
        layer.router.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]))
    x = torch.tensor([[1.0, 2.0, -1.5], [0.5, -1.0, 3.0]])
    # Logits 1, 2, -1.5, -1 and 0.5, -1, 3, -0.5.
    p, q = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(2.5))
    gates = [[p, 1 - p, 0, 0], [q, 0, 1 - q, 0]]
    torch.testing.assert_close(layer.gate(x), torch.tensor(gates))
    downs = [*layer.frozen_A, *layer.lora_A]
    ups = [*layer.frozen_B, *layer.lora_B]
    rows = []
    for row, weights in zip(x, gates, strict=True):
        # alpha / rank is 2 / 4.
        experts = zip(weights, downs, ups, strict=True)
        rows.append(sum(0.5 * weight * up @ (down @ row) for weight, down, up in experts))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + torch.stack(rows))


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_moe_granularity_changes_the_router_alone(experts):
    layer = MoELoRALinear(nn.Linear(3, 5), 4, experts=experts, freeze_router=True)
    assert layer.lora_A.numel() + layer.lora_B.numel() == 4 * (3 + 5)
    assert layer.scale == 2 and layer.router.numel() == 3 * experts
    layer.grow()
    assert layer.num_experts == 2 * experts and layer.router.numel() == 3 * experts
    layer.freeze_router = False
    layer.grow()
    assert layer.num_experts == 3 * experts and layer.router.numel() == 6 * experts


def test_codyra_threshold_is_soft_as_published():
    layer = CoDyRALinear(nn.Linear(3, 4), 6)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.05, -0.1, 0.15, -0.15, 0.3, -0.5]))
    layer.shrink(0.1)
    # The as-coded variant would also give zero for 0.15.
    assert layer.gate.tolist() == pytest.approx([0, 0, 0.05, -0.05, 0.2, -0.4])


def test_codyra_merge_drops_zero_ranks_and_leaves_outputs_unchanged():
    layer = CoDyRALinear(nn.Linear(3, 4, dtype=torch.float64), 5, 10, dtype=torch.float64)
    x, expected = torch.randn(7, 3, dtype=torch.float64), 0
    for task, zeros in enumerate(([1, 3], [0], [0, 1, 2, 3, 4])):
        if task:
            layer.renew(5)
            assert layer.gate.std() > 0 and layer.lora_B.abs().max() == 0
        fill(layer.lora_B)
        with torch.no_grad():
            layer.gate[zeros] = 0
        before = layer(x)
        for i in range(5):
            low = x @ layer.lora_A[i].detach()
            expected = expected + 2 * layer.gate[i].detach() * torch.outer(
                low, layer.lora_B[:, i].detach()
            )
        torch.testing.assert_close(before, layer.base_layer(x) + expected)
        layer.merge()
        assert len(layer.frozen_A) == layer.frozen_B.shape[1] == (3, 7, 7)[task]
        torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)
