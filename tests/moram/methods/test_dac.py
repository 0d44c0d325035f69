"""DAC: what a module computes, votes and merges, and steps of training written out by hand."""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from clip_steps import EXACT, PROMPTS, STEPS, TASKS, Adam, begin, double_clip, pictures
from tiny_models import open_clip_model
from torch import nn

from moram import adapters
from moram.layers import RankPoolLinear
from moram.methods.dac import DAC
from moram.models import split_attention

RANK, ACTIVE, KEPT, ALPHA, WEIGHT = 6, 4, 2, 3.0, 0.7
SCALE = ALPHA / RANK


def build(**more):
    settings = {"rank": RANK, "active": ACTIVE, "kept": KEPT, "alpha": ALPHA}
    return DAC(**(settings | {"orthogonality": WEIGHT, "seed": 3} | more))


def best(scores, count):
    """The places of the highest numbers, the first of equal ones, in that order."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


class Pool:
    """A module's pool as the paper writes it: dW = sum of b_i a_i^T over the chosen i."""

    def __init__(self, layer):
        self.down, self.up, self.router = (
            t.detach().clone() for t in (layer.lora_A, layer.lora_B, layer.router)
        )
        self.down.requires_grad_(True)
        self.up.requires_grad_(True)
        self.counts = [0] * RANK

    def choose(self, x):
        votes = Counter()
        for example in x.detach():
            scores = [float((row * example[0]).sum()) for row in self.router]
            votes.update(best(scores, ACTIVE))
        for place, number in votes.items():
            self.counts[place] += number
        return best([votes[place] for place in range(RANK)], ACTIVE)

    def update(self, places):
        return SCALE * sum(torch.outer(self.up[:, i], self.down[i]) for i in places)


class Hand:
    """A CLIP whose Linears add the pools' updates to their weights."""

    def __init__(self, paths):
        self.clip = double_clip()
        self.clip.model.requires_grad_(False)
        split_attention(self.clip.model)
        self.pools, self.changes, self.past = {}, {}, {path: [] for path in paths}
        for path in paths:
            linear = self.clip.model.get_submodule(path)
            linear.register_forward_hook(lambda *call, path=path: self.output(path, *call))

    def output(self, path, linear, inputs, _):
        weight = linear.weight + self.changes.get(path, 0)
        if path in self.pools:
            pool = self.pools[path]
            weight = weight + pool.update(pool.choose(inputs[0]))
        return F.linear(inputs[0], weight, linear.bias)

    def loss(self, pixels, labels, ids, seen):
        images, texts = self.clip.encode_image(pixels), self.clip.encode_text(ids)
        logits = self.clip.model.logit_scale.exp() * images @ texts.T
        loss = 0
        for n, label in enumerate(labels.tolist()):
            loss = loss - logits[n].log_softmax(0)[label] / len(labels)
            loss = loss - logits[:, label].log_softmax(0)[n] / (seen + len(ids))
        return loss

    def penalty(self):
        """The weight times the mean over modules of the mean |past . critical|."""
        found = 0
        for path, pool in self.pools.items():
            pairs = [(p, pool.up[:, j]) for p in self.past[path] for j in best(pool.counts, KEPT)]
            found = found + sum((p * c).sum().abs() for p, c in pairs) / len(pairs)
        return WEIGHT * found / len(self.pools)

    def merge(self):
        for path, pool in self.pools.items():
            places = best(pool.counts, KEPT)
            self.changes[path] = self.changes.get(path, 0) + pool.update(places).detach()
            self.past[path] += [pool.up[:, i].detach().clone() for i in places]
        self.pools = {}


def test_steps_of_two_tasks_equal_those_written_out():
    clip, method = double_clip(), build()
    method.setup(clip.model)
    clip.model.double()
    layers = adapters(clip.model, RankPoolLinear)
    hand = Hand(layers)
    moved = 0.0
    for task in (0, 1):
        stage, trainer = begin(clip, method, task)
        hand.pools = {path: Pool(layer) for path, layer in layers.items()}
        offset = stage.offset
        ids = PROMPTS[offset:][: stage.count]
        tensors = {(p, "A"): pool.down for p, pool in hand.pools.items()}
        tensors |= {(p, "B"): pool.up for p, pool in hand.pools.items()}
        adam, losses = Adam(tensors), []
        trainer.run(lambda _, loss, losses=losses: losses.append(loss))
        pixels, labels = pictures(task)
        for number in range(STEPS):
            rows = trainer.rows(number)
            loss = hand.loss(pixels[rows], labels[rows], ids, offset)
            assert losses[number] == pytest.approx(loss.item(), abs=1e-5)
            if task:
                loss = loss + hand.penalty()
            found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            zeros = (torch.zeros_like(t) for t in tensors.values())
            grads = [z if g is None else g for g, z in zip(found, zeros, strict=True)]
            adam.step(dict(zip(tensors, grads, strict=True)))
        for path, layer in layers.items():
            pool = hand.pools[path]
            assert layer.counts.tolist() == pool.counts, path
            torch.testing.assert_close(layer.lora_A.detach(), pool.down.detach(), **EXACT)
            torch.testing.assert_close(layer.lora_B.detach(), pool.up.detach(), **EXACT)
            moved += float(pool.up.detach().abs().max())
        method.end_task(clip.model, task, stage)
        hand.merge()
    assert moved > 1e-3 * len(layers)
    with torch.no_grad():
        pixels = pictures(1, seed=1)[0]
        torch.testing.assert_close(
            clip.encode_image(pixels), hand.clip.encode_image(pixels), **EXACT
        )
        torch.testing.assert_close(
            clip.encode_text(PROMPTS), hand.clip.encode_text(PROMPTS), **EXACT
        )


def layer_of(rank=4, active=2, width=3, **more):
    torch.manual_seed(0)
    return RankPoolLinear(nn.Linear(width, 2), rank, active=active, **more)


def test_the_batch_writes_with_the_experts_that_most_of_its_first_tokens_chose():
    layer = layer_of()
    # Token 0 alone counts: expert i reads the number i of it, the last one none.
    layer.router = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    first = torch.tensor([[5.0, 4, 1], [4, 1, 5], [5, -1, 4], [-1, -2, -3]])
    # Votes: {0, 1}, {2, 0}, {0, 2}, {3, 0}.
    x = torch.stack([first, torch.full_like(first, 9.0)], 1)
    assert layer.train().choose(x).tolist() == [0, 2]
    assert layer.counts.tolist() == [4, 1, 2, 1]
    assert layer.eval().choose(x).tolist() == [0, 2]
    assert layer.counts.tolist() == [4, 1, 2, 1], "votes count in training alone"
    # One to one: the first of equal ones.
    assert layer.choose(x[[0, 0, 3, 3]]).tolist() == [0, 1]
    with torch.no_grad():
        layer.lora_B.normal_()
        update = sum(torch.outer(layer.lora_B[:, i], layer.lora_A[i]) for i in (0, 2))
        expected = F.linear(x, layer.weight + layer.scale * update, layer.bias)
        torch.testing.assert_close(layer(x), expected)


def test_a_merge_keeps_the_most_used_experts_and_drops_the_others():
    layer = layer_of(active=3, alpha=2.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    layer.counts = torch.tensor([1, 7, 3, 7])
    down, up = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    layer.merge(2)
    assert torch.equal(layer.frozen_A, down[[1, 3]] * 0.5)
    assert torch.equal(layer.frozen_B, up[:, [1, 3]])
    assert len(layer.lora_A) == len(layer.router) == len(layer.counts) == 0
    x = torch.randn(5, 4, 3)
    weight = layer.weight + layer.scale * up[:, [1, 3]] @ down[[1, 3]]
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    layer.renew(4)
    assert len(layer.router) == 4 and not layer.lora_B.any() and not layer.counts.any()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))


def test_the_router_is_not_trained_and_a_task_trains_a_lora_of_its_rank():
    clip, method = double_clip(), build()
    method.setup(clip.model)
    for task in range(len(TASKS)):
        stage, trainer = begin(clip, method, task)
        layers = adapters(clip.model, RankPoolLinear).values()
        before = [layer.router.clone() for layer in layers]
        trainer.run()
        numbers = sum(RANK * (a.in_features + a.out_features) for a in layers)
        assert sum(p.numel() for p in trainer.parameters) == numbers
        assert all(torch.equal(a.router, b) for a, b in zip(layers, before, strict=True))
        method.end_task(clip.model, task, stage)
        kept = sum(KEPT * (a.in_features + a.out_features) for a in layers)
        assert method.stored_bytes(clip.model) == 4 * kept * (task + 1)


def test_the_published_numbers_of_experts_are_the_defaults():
    method = DAC()
    assert (method.rank, method.active, method.kept) == (12, 8, 4)
    assert [(m.active, m.kept) for m in (DAC(rank=16), DAC(rank=1))] == [(11, 5), (1, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, "active must be >= 1, got 0"),
        ({"active": 7}, "active must be at most rank=6, got 7"),
        ({"kept": 0}, "kept must be >= 1, got 0"),
        ({"kept": 7}, "kept must be at most rank=6, got 7"),
        ({"orthogonality": -1.0}, "orthogonality must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(**settings)


def test_a_layer_with_more_active_experts_than_ranks_is_refused():
    with pytest.raises(ValueError, match=r"^active must be at most rank=4, got 5$"):
        layer_of(active=5)


def test_a_model_whose_first_tokens_cannot_be_told_is_refused():
    model = open_clip_model()
    model.transformer.resblocks[0].attn.batch_first = False
    message = (
        "module transformer.resblocks.0.attn has tensors [T, B, D], whose first tokens cannot be "
        "told; build the model with batch_first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build().setup(model)
    assert not adapters(model, RankPoolLinear)
