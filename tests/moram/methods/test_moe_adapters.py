"""The block of MoE-Adapters against plain loops, and what freezes."""

import copy
import math

import pytest
import torch
from moe_adapter_runs import (
    BLOCKS,
    EXPERTS,
    MODELS,
    PROMPTS,
    WIDTH,
    build,
    clip_of,
    domain,
    every_model,
    learned,
)
from tiny_models import assert_equal, images
from torch import nn

from moram.layers.moe_adapters import PARTS, MoEAdapterMLP


def randomise(layer, seed=0):
    """Random numbers in whatever the layer trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (*PARTS, "router", "noise"):
            tensor = getattr(layer, name)
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def small_layer(features=6, tasks=1, **more):
    """A layer beside a linear map, after the start of some tasks, with random numbers."""
    settings = {"experts": EXPERTS, "width": WIDTH, "dropout": 0.0} | more
    torch.manual_seed(0)
    layer = MoEAdapterMLP(nn.Linear(features, features), features, **settings)
    for _ in range(tasks):
        layer.grow()
    return randomise(layer)


def call(layer, h):
    """The layer's output for a residual stream h, whose norm is the identity."""
    norm = nn.Identity()
    handle = layer.listen(norm)
    output = layer(norm(h))
    handle.remove()
    return output


def stream(rows=7, tokens=3, features=6):
    return torch.randn(rows, tokens, features, generator=torch.Generator().manual_seed(3))


def plain_update(h, router, experts, top_k, scale=0.1):
    """sum_e g_e Ad_e(h), sample by sample and expert by expert; experts = [(down, b, up, b)]."""
    update = torch.zeros_like(h)
    for row, sample in enumerate(h):
        logits = [float(sample[0] @ router[:, e]) for e in range(len(experts))]
        best = sorted(range(len(experts)), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e] - logits[best[0]]) for e in best)
        for e in best:
            gate = math.exp(logits[e] - logits[best[0]]) / total
            down, down_bias, up, up_bias = experts[e]
            for token in range(h.shape[1]):
                hidden = (down @ sample[token] + down_bias).clamp_min(0)
                update[row, token] += gate * scale * (up @ hidden + up_bias)
    return update


@every_model
@torch.no_grad()
def test_a_block_equals_plain_loops_over_samples_and_experts(kind):
    method, clip = build(), clip_of(MODELS[kind]())
    method.setup(clip.model)
    method.begin_task(clip.model, 0, None)
    clip.model.double()
    seen = {}
    for number, (block, norm) in enumerate(blocks_of(clip.model)):
        randomise(block.mlp, number)
        norm.register_forward_pre_hook(lambda m, a, n=number: seen.update({(n, "h"): a[0]}))
        block.register_forward_hook(lambda m, a, y, n=number: seen.update({(n, "y"): y}))
    clip.encode_image(images(5).double())
    clip.encode_text(PROMPTS)
    for number, (block, norm) in enumerate(blocks_of(clip.model)):
        h, y, layer = seen[number, "h"], seen[number, "y"], block.mlp
        experts = list(zip(*(getattr(layer, part) for part in PARTS), strict=True))
        update = plain_update(h, layer.router[0], experts, top_k=2)
        expected = h + layer.base_layer(norm(h)) + update
        assert update.abs().max() > 1e-2
        assert (y - expected).abs().max() < 1e-10
    assert number == BLOCKS - 1


def blocks_of(model):
    """All blocks of a model, each with the norm before its MLP."""
    return [
        (module, getattr(module, name))
        for module in model.modules()
        for name in ("ln_2", "layer_norm2")
        if hasattr(module, name)
    ]


@torch.no_grad()
def test_frozen_and_free_experts_write_at_their_places():
    layer = small_layer().double().eval()
    h = stream().double()
    experts = [tuple(getattr(layer, part)[e].clone() for part in PARTS) for e in range(EXPERTS)]
    expected = layer.base_layer(h) + plain_update(h, layer.router[0], experts, 2)
    layer.counts = torch.tensor([0, 5, 0, 9, 0])
    layer.freeze(2)
    assert layer.frozen.tolist() == [False, True, False, True, False]
    assert layer.down.shape == (3, WIDTH, 6) and layer.frozen_up.shape == (2, 6, WIDTH)
    assert (call(layer, h) - expected).abs().max() < 1e-12


def test_the_gradient_equals_that_of_plain_loops():
    layer, h = small_layer().double(), stream(rows=3).double().requires_grad_()
    layer.eval()
    names = [n for n, p in layer.named_parameters() if p.requires_grad and n != "noise"]
    wanted = [h, *(layer.get_parameter(n) for n in names)]
    weight = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((call(layer, h) * weight).sum(), wanted)
    logits = h[:, 0] @ layer.router[0]
    top = logits.topk(2).values.min(1, keepdim=True).values
    gates = logits.masked_fill(logits < top, -math.inf).softmax(1)
    hidden = (torch.einsum("btd,ewd->btew", h, layer.down) + layer.down_bias).relu()
    written = torch.einsum("btew,edw->bted", hidden, layer.up) + layer.up_bias
    plain = layer.base_layer(h) + 0.1 * torch.einsum("be,bted->btd", gates, written)
    expected = torch.autograd.grad((plain * weight).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10


@every_model
@torch.no_grad()
def test_untrained_experts_leave_the_model_bitwise_unchanged(kind):
    # Frozen as the other is: torch chooses its attention kernel by that.
    plain = clip_of(MODELS[kind]().requires_grad_(False))
    clip, method = clip_of(MODELS[kind]()), build()
    method.setup(clip.model)
    method.begin_task(clip.model, 0, None)
    for mode in (False, True):
        for model in (plain.model, clip.model):
            model.train(mode)
        assert torch.equal(clip.encode_image(images()), plain.encode_image(images()))
        assert torch.equal(clip.encode_text(PROMPTS), plain.encode_text(PROMPTS))


@every_model
@torch.no_grad()
def test_without_a_router_in_use_a_trained_model_is_bitwise_the_original(kind):
    # Frozen as the other is: torch chooses its attention kernel by that.
    plain = clip_of(MODELS[kind]().requires_grad_(False))
    clip, method = learned(kind, 1)
    assert not torch.equal(clip.encode_image(images()), plain.encode_image(images()))
    assert not torch.equal(clip.encode_text(PROMPTS), plain.encode_text(PROMPTS))
    for layer in method.layers(clip.model).values():
        layer.use(-1)
    assert torch.equal(clip.encode_image(images()), plain.encode_image(images()))
    assert torch.equal(clip.encode_text(PROMPTS), plain.encode_text(PROMPTS))


@torch.no_grad()
def test_gates_are_a_softmax_over_the_top_k():
    layer = small_layer().eval()
    x = stream()[:, 0]
    gates, chosen = layer.gate(x)
    dense = torch.zeros(len(x), EXPERTS).scatter(1, chosen, gates)
    torch.testing.assert_close(dense.sum(1), torch.ones(len(x)))
    assert ((dense > 0).sum(1) == 2).all()
    logits = x @ layer.router[0]
    for row in range(len(x)):
        first, second = sorted(logits[row].tolist())[::-1][:2]
        assert float(dense[row].max()) == pytest.approx(1 / (1 + math.exp(second - first)))
        assert int(dense[row].argmax()) == int(logits[row].argmax())


@torch.no_grad()
def test_experts_that_are_not_chosen_do_not_matter():
    layer, h = small_layer().eval(), stream(rows=1)
    before = call(layer, h)
    _, chosen = layer.gate(h[:, 0])
    for expert in range(EXPERTS):
        changed = copy.deepcopy(layer)
        changed.up[expert] += 1
        assert torch.equal(call(changed, h), before) == (expert not in chosen)


@torch.no_grad()
def test_each_task_has_a_router_of_its_own():
    layer, x = small_layer(tasks=0).eval(), stream()[:, 0]
    routers = torch.randn(3, 6, EXPERTS, generator=torch.Generator().manual_seed(9))
    for router in routers:
        layer.grow()
        layer.router.copy_(router.unsqueeze(0))
    for task in (1, 0, 2):
        layer.use(task)
        assert torch.equal(layer.gate(x)[1], (x @ routers[task]).topk(2).indices)


@torch.no_grad()
def test_the_gate_depends_on_token_0_alone():
    layer, h = small_layer().eval(), stream()
    other = h.clone()
    other[:, 1:] += 1
    assert torch.equal(call(layer, h)[:, 0], call(layer, other)[:, 0])


@torch.no_grad()
def test_noise_is_added_in_training_alone_and_as_published():
    layer, x = small_layer(top_k=EXPERTS), stream()[:, 0]
    torch.manual_seed(5)
    gates, chosen = layer.train().gate(x)
    torch.manual_seed(5)
    draw = torch.randn(len(x), EXPERTS)
    spread = torch.log1p(torch.exp(x @ layer.noise[0])) + 0.01
    expected = (x @ layer.router[0] + draw * spread).softmax(1)
    found = torch.zeros(len(x), EXPERTS).scatter(1, chosen, gates)
    torch.testing.assert_close(found, expected)
    gates, chosen = layer.eval().gate(x)
    found = torch.zeros(len(x), EXPERTS).scatter(1, chosen, gates)
    torch.testing.assert_close(found, (x @ layer.router[0]).softmax(1))


@torch.no_grad()
def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    # A single expert is always chosen with gate 1, so noise changes nothing.
    layer, h = small_layer(experts=1, width=16, dropout=0.5), stream(1, 1)
    plain = call(small_layer(experts=1, width=16), h)
    assert torch.equal(call(layer.eval(), h), plain)
    torch.manual_seed(0)
    drawn = call(layer.train(), h.expand(20000, 1, 6))
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0, keepdim=True) - plain).abs()
    assert (error < 5 * drawn.std(0) / math.sqrt(20000)).all()


@torch.no_grad()
def test_more_top_k_than_experts_is_all_experts():
    layer = small_layer(top_k=9).eval()
    gates, _ = layer.gate(stream()[:, 0])
    assert gates.shape == (7, EXPERTS)


@torch.no_grad()
def test_a_copied_model_hears_its_own_norms():
    clip, _ = learned(tasks=1)
    other = clip_of(copy.deepcopy(clip.model))
    assert torch.equal(other.encode_image(images()), clip.encode_image(images()))
    with pytest.raises(RuntimeError, match="listen"):
        small_layer()(stream())


def test_bfloat16_autocast_trains():
    layer, h = small_layer(), stream()
    with torch.autocast("cpu", torch.bfloat16):
        call(layer, h).float().sum().backward()
    assert layer.up.grad.abs().max() > 0


def test_checkpointed_blocks_give_the_same_gradients():
    grads = []
    for is_checkpointed in (False, True):
        clip, _ = learned(tasks=1)
        if is_checkpointed:
            # The name that newer versions of transformers use, where there is one.
            old = clip.model.gradient_checkpointing_enable
            enable = getattr(clip.model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": False})
        clip.model.train()
        torch.manual_seed(0)
        clip.encode_image(domain(0)).sum().backward()
        grads.append([p.grad for p in clip.model.parameters() if p.grad is not None])
    assert grads[0]
    assert_equal(*grads)


def force(layer, order):
    """Let token 0 = ones choose these experts, the earlier the stronger."""
    with torch.no_grad():
        layer.router.zero_()
        layer.noise.fill_(-100)
        for place, expert in enumerate(order):
            layer.router[0, :, expert] = 10 * (len(order) - place)


def test_the_most_used_experts_freeze_and_ties_go_to_the_first():
    layer, h = small_layer().train(), torch.ones(1, 2, 6)
    for rows, order in ((3, (4, 2)), (2, (2, 0)), (3, (1, 0))):
        force(layer, order)
        call(layer, h.expand(rows, 2, 6))
    # Expert 2 for 3 + 2 samples, 0 for 2 + 3, 4 for 3, 1 for 3, 3 for none.
    assert layer.counts.tolist() == [5, 3, 5, 0, 3]
    layer.freeze(3)
    assert layer.frozen.tolist() == [True, True, True, False, False]
    layer.grow()
    assert layer.counts.tolist() == [0] * EXPERTS
    force(layer, (0, 4))
    call(layer, h)
    layer.freeze(2)
    # Only 4 was used and free; 3 was never used.
    assert layer.frozen.tolist() == [True, True, True, False, True]
    layer.freeze(EXPERTS)
    assert layer.frozen.tolist() == [True, True, True, False, True]


def test_samples_are_not_counted_outside_training():
    layer = small_layer()
    call(layer.eval(), stream())
    layer.train().use(-1)
    call(layer, stream())
    assert layer.counts.sum() == 0


def test_a_vit_b_16_has_43_6_million_numbers_in_its_experts():
    # 12 blocks of width 768 for images, 12 of 512 for texts:
    # 2 * 64 * 768 + 64 + 768 = 99,136 and 2 * 64 * 512 + 64 + 512 = 66,112 an expert.
    one, routers, after = 12 * (99_136 + 66_112), 0, 0
    assert 22 * one == 43_625_472
    experts = 0
    for features in (768, 512):
        layer = MoEAdapterMLP(nn.Identity(), features)
        layer.grow()
        layer.counts += 1
        experts += 12 * sum(getattr(layer, part).numel() for part in PARTS)
        routers += 12 * (layer.router.numel() + layer.noise.numel())
        layer.freeze(2)
        after += 12 * sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert experts == 22 * one
    # 2 * 22 * 12 * (768 + 512)
    assert routers == 675_840
    assert after == 20 * one + 675_840
    assert 2 * one == 3_965_952


def test_a_router_that_does_not_exist_cannot_be_used():
    layer = small_layer(tasks=2)
    for task in (-2, 2):
        with pytest.raises(ValueError, match=rf"task must be in -1..1, got {task}"):
            layer.use(task)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        small_layer(dropout=1)
