"""Each baseline's own equations, against values by hand or by plain loops. No layers here."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moram.methods import TrainSettings, make_method
from moram.methods.base import Step
from moram.methods.moe_lora import imbalance
from moram.methods.train import Stage
from moram.methods.tree_lora import Node, build_tree, differences
from moram.trace.encode import Rows

TWO = {"targets": ("0", "1"), "rank": 2}
STEP = Step(1, 0, 8, 4, torch.tensor(3.0))


def setup(name, **settings):
    """A method on two Linears of unequal shapes, 3 -> 4 and 4 -> 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    method = make_method(name, **(TWO | settings))
    method.setup(model)
    method.begin_task(model, 0, None)
    return method, model, list(method.layers(model).values())


def fill(*tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape))


def test_a_lora_per_task_is_chosen_until_the_next_task_begins():
    method, model, layers = setup("task-lora")
    x, outputs = torch.randn(5, 3), []
    for task in range(2):
        if task:
            method.select(model, 0)
            method.begin_task(model, task, None)
        fill(*(layer.lora_B for layer in layers))
        outputs.append(model(x))
    for task in range(2):
        method.select(model, task)
        assert torch.equal(model(x), outputs[task])
    method.select(model, 2)
    base = layers[1].base_layer(layers[0].base_layer(x))
    assert torch.equal(model(x), base), "a task that was not learned yet gets the base"


def test_o_lora_penalty_is_the_sum_of_absolute_inner_products():
    method, model, layers = setup("o-lora", lambda1=0.7, lambda2=0.3)
    norms = sum(math.sqrt(sum(float(v) ** 2 for v in a.lora_A.detach().flatten())) for a in layers)
    assert method.penalty(model, STEP).item() == pytest.approx(0.3 * norms)
    olds = [[layer.lora_A.detach().clone()] for layer in layers]
    for task in (1, 2):
        method.begin_task(model, task, None)
        fill(*(layer.lora_B for layer in layers))
        expected = 0.0
        for layer, old in zip(layers, olds, strict=True):
            for earlier in old:
                for a in earlier.tolist():
                    for b in layer.lora_A.tolist():
                        product = sum(p * q for p, q in zip(a, b, strict=True))
                        expected += 0.7 * abs(product)
            for part in (layer.lora_A, layer.lora_B):
                expected += 0.3 * math.sqrt(sum(float(v) ** 2 for v in part.detach().flatten()))
            old.append(layer.lora_A.detach().clone())
        assert method.penalty(model, STEP).item() == pytest.approx(expected)


def test_o_lora_penalty_is_zero_in_the_first_task_and_positive_from_the_second_on():
    method, model, layers = setup("o-lora")
    assert method.penalty(model, STEP) is None
    method.begin_task(model, 1, None)
    assert method.penalty(model, STEP) > 0
    with torch.no_grad():
        layers[0].frozen_A.copy_(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]))
        layers[0].lora_A.copy_(torch.tensor([[0, 0, 2.0], [0, 0, 3]]))
        layers[1].lora_A.zero_()
    assert method.penalty(model, STEP) == 0, "orthogonal rows cost nothing"


class TwoTokens(nn.Module):
    """A language model of two tokens: the logits after a token are a Linear of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
        self.out = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        return SimpleNamespace(logits=self.out(self.embed[input_ids[:, logits_to_keep]]))


@pytest.mark.parametrize("micro", [1, 2])
def test_ewc_fisher_and_penalty_are_those_of_hand_made_gradients(micro):
    model = TwoTokens()
    method = make_method("ewc", targets=("out",), rank=1, alpha=1, lam=10.0, gamma=0.5)
    method.setup(model)
    down, up = model.out.lora_A, model.out.lora_B
    with torch.no_grad():
        down.copy_(torch.tensor([[0.5, 1.0]]))
        up.copy_(torch.tensor([[1.0], [-2.0]]))
    ids = torch.tensor([[0, 1], [1, 1]])
    data = Rows(ids.tolist(), [1, 1], pad=0, multiple=1)
    settings = TrainSettings(batch_size=2, micro_batch=micro)
    assert method.penalty(model, STEP) is None
    method.end_task(model, 0, Stage(model, data, settings))
    # Example h = (1, 2): A h = 2.5, logits (2.5, -5); h = (-1, 0.5): A h = 0. Answer: token 1.
    squares_down, squares_up = [0.0, 0.0], [0.0, 0.0]
    for h, low in (((1.0, 2.0), 2.5), ((-1.0, 0.5), 0.0)):
        p = 1 / (1 + math.exp(-3 * low))
        error = (p, -p)  # softmax minus the answer
        through = 1.0 * error[0] - 2.0 * error[1]
        for i in range(2):
            squares_down[i] += (through * h[i]) ** 2 / 2
            squares_up[i] += (error[i] * low) ** 2 / 2
    name = "out.lora_"
    assert method.fisher[f"{name}A"].flatten().tolist() == pytest.approx(squares_down)
    assert method.fisher[f"{name}B"].flatten().tolist() == pytest.approx(squares_up)
    with torch.no_grad():
        down += 0.1
        up -= 0.2
    expected = 0.5 * 10 * (0.01 * sum(squares_down) + 0.04 * sum(squares_up))
    assert method.penalty(model, STEP).item() == pytest.approx(expected, rel=1e-5)
    # A second task of the same gradients: what is left is half, what comes is whole.
    with torch.no_grad():
        down -= 0.1
        up += 0.2
    method.end_task(model, 1, Stage(model, data, settings))
    expected = [1.5 * v for v in squares_down]
    assert method.fisher[f"{name}A"].flatten().tolist() == pytest.approx(expected)
    assert method.penalty(model, STEP) == 0


def test_tree_splits_each_group_at_the_median_of_its_similarities():
    # Module 0: mean 1.25, similarities 1.25, 2.5, 3.75, -1.25, median 1.875.
    # Module 1: of tasks 1 and 2, mean 3: 15 and 3, median 9; of 0 and 3 equal ones: halves, 4.
    steps = [[torch.tensor([a]), torch.tensor([b])] for a, b in ((1, 2), (2, 5), (3, 1), (-1, 2))]
    steps = [[v.float() for v in task] for task in steps]
    near = Node((1, 2), 9.0, (Node((1,)), Node((2,))))
    far = Node((0, 3), 4.0, (Node((0,)), Node((3,))))
    assert build_tree(steps) == Node((0, 1, 2, 3), 1.875, (near, far))
    assert build_tree([task[:1] for task in steps]).children == (Node((1, 2)), Node((0, 3)))
    signals = [[torch.tensor([1.0])], [torch.tensor([4.0])], [torch.tensor([2.0])]]
    assert [float(task[0]) for task in differences(signals)] == [1.0, 3.0, -2.0]


def test_tree_lora_remembers_the_mean_of_the_last_epoch():
    method, model, layers = setup("tree-lora")
    for number in range(8):
        with torch.no_grad():
            for i, layer in enumerate(layers):
                layer.lora_A.fill_(number + 10 * i)
        assert method.penalty(model, STEP._replace(number=number)) is None
    method.end_task(model, 0, None)
    assert [set(g.tolist()) for g in method.signals[0]] == [{5.5}, {15.5}]


@pytest.mark.parametrize("sign", [1, -1])
def test_tree_lora_regulariser_pulls_towards_the_picked_task(sign):
    method, model, layers = setup("tree-lora", reg=0.4)
    method.signals = [[sign * (2 * a.lora_A.detach().flatten() + 0.1) for a in layers]]
    method.begin_task(model, 1, None)
    method.penalty(model, STEP)
    penalty = method.penalty(model, STEP._replace(number=6))
    goals = method.signals[0]
    inner = sum((a.lora_A.flatten() @ g).item() for a, g in zip(layers, goals, strict=True))
    assert inner * sign > 0
    # Two of four steps into the epoch: half of reg, times the loss of 3.
    assert penalty.item() == pytest.approx(-0.4 * 0.5 * 3 * sign, rel=1e-4)
    penalty.backward()
    for layer, goal in zip(layers, goals, strict=True):
        expected = -0.4 * 0.5 * 3 * goal / abs(inner)
        torch.testing.assert_close(layer.lora_A.grad.flatten(), expected, rtol=1e-4, atol=1e-6)
    assert method.visits.tolist() == [[2.0, 2.0]]


def test_tree_lora_scores_and_draws_as_its_docstring_says():
    method, model, _ = setup("tree-lora")
    method.signals = [[torch.zeros(6), torch.zeros(8)]] * 2
    method.begin_task(model, 2, None)
    method.visits = torch.tensor([[2.0, 1.0], [4.0, 0.0]], dtype=torch.float64)
    method.distances = torch.tensor([[6.0, 2.0], [4.0, 0.0]], dtype=torch.float64)
    # Step k = 1 of N = 4: log(2 * 4 * 2 * 3). Visits 2, 1, 4, 0; mean distances 3, 2, 1, 0.
    top = math.sqrt(math.log(48))
    bonus = [top / math.sqrt(2 * n + 1e-5) for n in (2, 1, 4, 0)]
    near = [b - d for b, d in zip(bonus, (3, 2, 1, 0), strict=True)]
    assert method.scores(1, 4).flatten().tolist() == pytest.approx(near)
    method.favour = "distant"
    distant = [b + d for b, d in zip(bonus, (3, 2, 1, 0), strict=True)]
    assert method.scores(1, 4).flatten().tolist() == pytest.approx(distant)
    method.favour, seen = "near", []
    method._root = Node((0, 1), 1.2, (Node((1,)), Node((0,))))
    method._draw = lambda probabilities: seen.append(probabilities.tolist()) or 0
    assert method.pick(1, 4) == [0, 0]
    # Task 0 was drawn first, so its branch, which is itself, is raised by 1.2.
    shifted = [value - min(near) for value in near]
    raised = [1.2 * shifted[0], 1.2 * shifted[1], shifted[2], shifted[3]]
    span = max(raised) - min(raised) + 1e-5
    a, b, c, d = (value / span for value in raised)
    softmax = [[1 / (1 + math.exp(q - p)), 1 / (1 + math.exp(p - q))] for p, q in ((a, c), (b, d))]
    assert seen[0] == pytest.approx([0.0, 1.0]), "the task that was never visited comes first"
    assert seen[1] == pytest.approx(softmax[0]) and seen[2] == pytest.approx(softmax[1])


def test_hide_lora_loss_is_cross_entropy_of_rows_against_themselves():
    method, model, layers = setup("hide-lora")
    with torch.no_grad():
        layers[0].lora_A.copy_(torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
        layers[1].lora_A.zero_()
    # A A^T / 0.8 = [[1.25, 1.25], [1.25, 2.5]]; the second module's is zero.
    rows = [math.log(2), math.log(math.exp(1.25) + math.exp(2.5)) - 2.5]
    expected = 0.5 * (sum(rows) / 2 + math.log(2))
    assert method.penalty(model, STEP).item() == pytest.approx(expected)


def test_moe_balance_loss_is_the_squared_coefficient_of_variation_of_each_example():
    # Importances 1.5 and 0.5: variance 0.25, mean 1. The second example without its padding: 0, 1.
    gates = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.9, 0.1], [0.0, 1.0]]])
    mask = torch.tensor([[1, 1], [0, 1]])
    assert float(imbalance(gates, mask)) == pytest.approx((0.25 + 1.0) / 2)
    # 0.9 and 1.1 with it: variance 0.01.
    assert float(imbalance(gates)) == pytest.approx((0.25 + 0.01) / 2)
    method, model, layers = setup("moe-lora", experts=2, top_k=1, balance=0.1)
    model.train()
    model(torch.ones(1, 3, 3))
    # One of two experts gets everything, in both modules: 1.
    assert method.auxiliary(model).item() == pytest.approx(0.1)
    assert method.auxiliary(model) is None and layers[0].gates is None
    model.eval()(torch.zeros(1, 3, 3))
    assert method.auxiliary(model) is None


class Masked(nn.Module):
    """A model that is told where its inputs are padding."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 3)

    def forward(self, x, attention_mask=None):
        return self.out(x)


def test_moe_balance_loss_leaves_padding_out():
    method, model = make_method("moe-lora", targets=("out",), experts=2, rank=2, top_k=1), Masked()
    method.setup(model)
    with torch.no_grad():
        model.out.router.copy_(torch.eye(2))
    x = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]]])
    model.train()(x, attention_mask=torch.tensor([[1, 1], [0, 1]]))
    # Balanced, and one of two experts alone: (0 + 1) / 2.
    assert method.auxiliary(model).item() == pytest.approx(0.01 * 0.5)


def test_codyra_threshold_is_zero_at_first_then_climbs_a_grid_of_fifty():
    method = make_method("codyra", max_kappa=0.49)
    grid = [method.kappa(n, 500) for n in (0, 249, 250, 254, 255, 260, 499)]
    assert grid == pytest.approx([0, 0, 0, 0, 0.01, 0.02, 0.49])
