"""InfLoRA and the stack of LoRAs: their subspaces against plain derivations from the inputs."""

import pytest
import torch
from torch import nn

from moram.methods import make_method
from moram.methods.inf_lora import DualMemory, complement

TWO = {"targets": ("0", "1"), "rank": 2, "alpha": 2}


class Inputs(nn.Module):
    """What a stage gives to the hooks: some inputs of a model, all at once."""

    def __init__(self, model, x):
        super().__init__()
        self.model, self.x = model, x

    def pass_over(self, limit=None):
        self.model(self.x[:limit])


def two_linears(name, seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double()
    method = make_method(name, **(TWO | settings))
    method.stages(4)
    method.setup(model)
    return method, model.double(), list(method.layers(model).values())


def draw(model, rank=6, count=40):
    """Inputs that lie in a few directions, as a stage."""
    x = torch.randn(count, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    return Inputs(model, x * torch.logspace(0, -1, 6, dtype=torch.float64))


def projector(rows):
    return rows.T @ rows


def gpm(memory, inputs, energy):
    """Gradient projection memory [D, k] on the inputs [n, D] themselves."""
    residue = inputs - inputs @ memory @ memory.T
    _, sizes, right = torch.linalg.svd(residue, full_matrices=False)
    total, count = inputs.square().sum(), 0
    while total - residue.square().sum() + sizes[:count].square().sum() < energy * total:
        count += 1
    return torch.cat([memory, right[:count].T], 1)


def train(layers):
    """As if a task had been learned."""
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_()


def test_a_is_the_main_directions_of_the_inputs_outside_those_of_earlier_tasks():
    method, model, layers = two_linears("inf-lora", epsilon=0.6, end=0.8)
    memory = torch.zeros(6, 0, dtype=torch.float64)
    for task in range(3):
        stage = draw(model)
        residue = stage.x - stage.x @ memory @ memory.T
        expected = torch.linalg.svd(residue).Vh[:2]
        method.begin_task(model, task, stage)
        down = layers[0].lora_A
        torch.testing.assert_close(3 * projector(down), projector(expected))
        assert not down.requires_grad and layers[0].lora_B.requires_grad
        assert not layers[0].lora_B.any()
        train(layers)
        method.end_task(model, task, stage)
        memory = gpm(memory, stage.x, 0.6 + 0.2 * task / 4)
        kept = method.memories["0"]
        inside = projector(kept.rows)
        inside = torch.eye(6).double() - inside if kept.is_outside else inside
        torch.testing.assert_close(inside, memory @ memory.T)
        assert 2 * len(kept.rows) <= 6, "the smaller of the two is kept"


def test_a_later_task_of_inf_lora_changes_nothing_for_inputs_within_the_memory():
    method, model, layers = two_linears("inf-lora", epsilon=1 - 1e-9)
    first, second = draw(model, rank=3), draw(model)
    method.begin_task(model, 0, first)
    train(layers)
    method.end_task(model, 0, first)
    assert method.memories["0"].rows.shape == (3, 6)
    before, other = model(first.x), model(second.x)
    method.begin_task(model, 1, second)
    train(layers[:1])
    torch.testing.assert_close(model(first.x), before)
    assert (model(second.x) - other).abs().max() > 0.1


def test_without_a_direction_left_inf_lora_learns_nothing_there():
    method, model, layers = two_linears("inf-lora", epsilon=1 - 1e-9)
    stage = draw(model)
    method.begin_task(model, 0, stage)
    method.end_task(model, 0, stage)
    method.begin_task(model, 1, stage)
    assert method.memories["0"].rows.shape == (0, 6)
    assert not layers[0].lora_A.any()


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_a_complement_holds_what_is_left(count):
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:count]
    rest = complement(rows)
    assert rest.shape == (6 - count, 6)
    torch.testing.assert_close(projector(rows) + projector(rest), torch.eye(6).double())


@pytest.mark.parametrize("energy, axes", [(0.55, [1]), (0.61, [1, 2]), (0.81, [1, 2, 3])])
def test_the_memory_takes_the_fewest_directions_that_reach_the_energy(energy, axes):
    moment = torch.diag(torch.tensor([0.5, 6, 2, 1.5])).double()
    found = DualMemory(torch.zeros(0, 4).double(), False).with_moment(moment, energy)
    inside = projector(complement(found.rows) if found.is_outside else found.rows)
    expected = torch.zeros(4).double().index_fill(0, torch.tensor(axes), 1)
    torch.testing.assert_close(inside, torch.diag(expected))


@pytest.mark.parametrize("bad", [{"epsilon": 0}, {"epsilon": 0.9, "end": 0.8}, {"end": 1.1}])
def test_energies_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="epsilon and end must be in"):
        make_method("inf-lora", **bad)


def test_a_stack_without_protection_is_o_lora_without_its_penalty():
    ends = []
    for name, more in (("lora-stack", {}), ("o-lora", {"lambda1": 0})):
        method, model, layers = two_linears(name, **more)
        for task in range(3):
            method.begin_task(model, task, draw(model))
            train(layers)
            method.end_task(model, task, None)
        ends.append(model(torch.ones(2, 6, dtype=torch.float64)))
    assert torch.equal(*ends)


def test_a_protected_stack_is_blind_to_earlier_inputs_and_half_as_strong_at_first():
    method, model, layers = two_linears("lora-stack", protect=0.999999)
    first, second = draw(model, rank=3), draw(model)
    method.begin_task(model, 0, first)
    train(layers)
    method.end_task(model, 0, first)
    before = model(first.x)
    method.begin_task(model, 1, second)
    new, old = layers[0].acting_A(), layers[0].frozen_A[0]
    torch.testing.assert_close(first.x @ new.T, torch.zeros(40, 2).double())
    # The measure is a mean over rows of their root mean squares.
    mean = [(second.x @ rows.T).square().mean(0).sqrt().mean().item() for rows in (new, old)]
    assert mean[0] == pytest.approx(0.5 * mean[1])
    train(layers[:1])
    torch.testing.assert_close(model(first.x), before)
    acting, whole = new.detach().clone(), model(second.x)
    method.end_task(model, 1, second)
    assert layers[0].guard is None and torch.equal(layers[0].lora_A, acting)
    torch.testing.assert_close(model(second.x), whole)


def test_the_settings_of_a_protected_stack_are_checked_as_those_of_moram():
    with pytest.raises(ValueError, match=r"protect must be in \(0, 1\)"):
        make_method("lora-stack", protect=1.5)
