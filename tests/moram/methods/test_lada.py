"""LADA: steps of training written out by hand, what it keeps, and how it classifies."""

import math
import re

import pytest
import torch
from clip_steps import EXACT, PROMPTS, STEPS, TASKS, Adam, Test, begin, double_clip, pictures
from tiny_models import assert_equal, hf_clip, open_clip_model

from moram import adapters
from moram.layers import Adapter
from moram.layers.adaptformer import AdaptFormerMLP
from moram.methods.lada import LADA

UNITS, PARTS, WIDTH, SHARPNESS, STRENGTH, REPLAY = 3, 2, 4, 2.0, 1.5, 0.6
# Of the text encoder: its blocks and their width. E: of the features.
BLOCKS, TEXT, E = 2, 32, 16
NAMES = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "scale")


def build(**more):
    settings = {"units": UNITS, "components": PARTS, "width": WIDTH, "sharpness": SHARPNESS}
    return LADA(**(settings | {"strength": STRENGTH, "replay": REPLAY, "seed": 3} | more))


def set_up(**more):
    clip, method = double_clip(), build(**more)
    method.setup(clip.model)
    clip.model.double()
    return clip, method


@torch.enable_grad()
def learn(clip, method, task):
    stage, trainer = begin(clip, method, task)
    trainer.run()
    method.end_task(clip.model, task, stage)
    return stage


def learned(tasks=2, **more):
    clip, method = set_up(**more)
    for task in range(tasks):
        learn(clip, method, task)
    return clip, method


def plain_clip():
    """The model as it was, frozen too: torch chooses its attention kernel by that."""
    clip = double_clip()
    clip.model.requires_grad_(False)
    return clip


class HandTexts:
    """A text encoder whose blocks add AdaptFormer's bottlenecks, by hooks on the plain model."""

    def __init__(self, layers):
        self.clip = plain_clip()
        self.tensors = {
            (i, name): getattr(layer, name).detach().clone().requires_grad_(True)
            for i, layer in enumerate(layers)
            for name in NAMES
        }
        for i, block in enumerate(self.clip.model.transformer.resblocks):
            block.ln_2.register_forward_pre_hook(
                lambda norm, inputs, block=block: setattr(block, "h", inputs[0])
            )
            block.mlp.register_forward_hook(
                lambda mlp, inputs, out, i=i, block=block: out + self.update(i, block.h)
            )

    def update(self, i, h):
        t = {name: self.tensors[i, name] for name in NAMES}
        spread = ((h - h.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + 1e-5
        h = (h - h.mean(-1, keepdim=True)) / spread.sqrt() * t["norm_weight"] + t["norm_bias"]
        hidden = (h @ t["down"].T + t["down_bias"]).clamp_min(0)
        return t["scale"] * (hidden @ t["up"].T + t["up_bias"])


def step_by_hand(features, labels, weights, texts, scale, owned):
    """The loss of weighted features, and its gradient by each unit, from the equations.

    owned: (unit, its class) of all units. d loss / d w = sum over features of weight
    (p_c - [c is right]) strength sharpness exp(-sharpness (1 - w . f)) f, for w of class c.
    """
    loss, gradients = 0.0, [torch.zeros(E, dtype=torch.float64) for _ in owned]
    for f, right, weight in zip(features, labels, weights, strict=True):
        near = [math.exp(-SHARPNESS * (1 - float(unit @ f))) for unit, _ in owned]
        scores = scale * (texts @ f)
        for place, (_, label) in enumerate(owned):
            extra = torch.zeros(len(texts), dtype=torch.float64)
            extra[label] = STRENGTH * near[place]
            scores = scores + extra
        chances = scores.exp() / scores.exp().sum()
        loss = loss - weight * chances[right].log()
        for place, (_, label) in enumerate(owned):
            slope = weight * (chances[label].item() - (label == right)) * STRENGTH * SHARPNESS
            gradients[place] += slope * near[place] * f
    return loss, gradients


def test_steps_of_two_tasks_equal_those_written_out():
    clip, method = set_up()
    layers = list(adapters(clip.model, AdaptFormerMLP).values())
    assert len(layers) == BLOCKS
    scale = clip.model.logit_scale.exp().item()
    old_texts, frozen = torch.zeros(0, E, dtype=torch.float64), []
    for task in (0, 1):
        stage, trainer = begin(clip, method, task)
        memory = method.memory(clip.model)
        hand = HandTexts(layers)
        units = {("unit", k): u.detach().clone() for k, u in enumerate(memory.units)}
        owners = memory.labels.tolist()
        kept, drawn = method.kept, torch.Generator()
        drawn.set_state(method.generator.get_state())
        adam, losses = Adam(hand.tensors | units), []
        trainer.run(lambda _, loss, losses=losses: losses.append(loss))
        with torch.no_grad():
            images = double_clip().encode_image(pictures(task)[0])
        offset, count = stage.offset, stage.count
        for number in range(STEPS):
            rows = trainer.rows(number)
            features, labels = list(images[rows]), (pictures(task)[1][rows] + offset).tolist()
            weights = [count / len(rows) / (offset + count)] * len(rows)
            if task:
                shape = kept["means"].shape
                noise = torch.randn(shape, dtype=torch.float64, generator=drawn)
                for place in range(len(noise)):
                    point = kept["means"][place] + noise[place] * kept["variances"][place] ** 0.5
                    features.append(point / point.norm())
                    labels.append(int(kept["labels"][place]))
                    weights.append(REPLAY * float(kept["weights"][place]) / (offset + count))
            texts = torch.cat([old_texts, hand.clip.encode_text(PROMPTS[offset:][:count])])
            owned = frozen + [(units["unit", k], owner) for k, owner in enumerate(owners)]
            loss, gradients = step_by_hand(features, labels, weights, texts, scale, owned)
            assert losses[number] == pytest.approx(loss.item(), abs=1e-5)
            found = torch.autograd.grad(loss, list(hand.tensors.values()))
            steps = dict(zip(hand.tensors, found, strict=True))
            steps |= dict(zip(units, gradients[len(frozen) :], strict=True))
            adam.step(steps)
        expected = torch.stack(list(units.values()))
        torch.testing.assert_close(memory.units.detach(), expected, **EXACT)
        for (i, name), tensor in hand.tensors.items():
            ours = getattr(layers[i], name).detach()
            torch.testing.assert_close(ours, tensor.detach(), **EXACT)
            assert (tensor != 0).any()
        method.end_task(clip.model, task, stage)
        frozen += [(unit.clone(), owner) for unit, owner in zip(expected, owners, strict=True)]
        old_texts = torch.cat([old_texts, hand.clip.encode_text(PROMPTS[offset:][:count]).detach()])
        torch.testing.assert_close(method.kept["texts"], old_texts, **EXACT)


@torch.no_grad()
def test_answers_are_among_learned_classes_where_the_best_text_is_one_of_theirs():
    clip, method = learned(1)
    plain = plain_clip()
    pixels = torch.cat([pictures(task, 4, seed=1)[0] for task in (0, 1)])
    images, texts = plain.encode_image(pixels), plain.encode_text(PROMPTS)
    # The best text of about half the images.
    best = texts[images.mean(0).mul(texts).sum(1).argmax()]
    apart = images[0] - images.mean(0)
    method.kept["texts"][1] = torch.nn.functional.normalize(best + apart, dim=0)
    texts = torch.cat([method.kept["texts"], texts[3:]])
    memory, seen = method.memory(clip.model), set()
    scores = method.classifier(clip, PROMPTS)(Test(clip, pixels))
    for row, f in zip(scores, images, strict=True):
        expected = plain.scale * texts @ f
        is_learned = bool(expected.argmax() < 3)
        seen.add(is_learned)
        if is_learned:
            for unit, label in zip(memory.frozen_units, memory.frozen_labels, strict=True):
                expected[label] += STRENGTH * (-SHARPNESS * (1 - unit @ f)).exp()
            expected[3:] = -math.inf
        torch.testing.assert_close(row, expected, **EXACT)
    assert seen == {True, False}


@torch.no_grad()
def test_the_model_encodes_as_before_between_tasks():
    clip, _ = learned(2)
    plain = plain_clip()
    pixels = pictures(0)[0]
    assert torch.equal(clip.encode_text(PROMPTS), plain.encode_text(PROMPTS))
    assert torch.equal(clip.encode_image(pixels), plain.encode_image(pixels))


@torch.no_grad()
def test_before_the_first_task_scores_are_zero_shots():
    clip, method = learned(0)
    pixels, plain = pictures(0)[0], plain_clip()
    expected = plain.logits(plain.encode_image(pixels), plain.encode_text(PROMPTS))
    assert torch.equal(method.classifier(clip, PROMPTS)(Test(clip, pixels)), expected)


def test_units_texts_and_mixtures_of_earlier_tasks_are_bitwise_unchanged():
    clip, method = learned(1)
    memory = method.memory(clip.model)
    before = [memory.frozen_units.clone(), memory.frozen_labels.clone()]
    kept = {name: t.clone() for name, t in method.kept.items()}
    learn(clip, method, 1)
    now = [memory.frozen_units, memory.frozen_labels]
    assert [len(t) for t in now] == [UNITS * 5] * 2
    assert_equal([t[: UNITS * 3] for t in now], before)
    for name, tensor in kept.items():
        assert torch.equal(method.kept[name][: len(tensor)], tensor)
    assert memory.frozen_labels.tolist() == [c for c in range(5) for _ in range(UNITS)]
    assert method.kept["labels"].tolist() == [c for c in range(5) for _ in range(PARTS)]


def test_each_task_trains_and_stores_what_is_stated():
    clip, method = double_clip(), build()
    method.setup(clip.model)
    block = 2 * WIDTH * TEXT + WIDTH + 3 * TEXT + 1
    seen = 0
    for task, names in enumerate(TASKS):
        stage, trainer = begin(clip, method, task)
        numbers = UNITS * E * len(names) + BLOCKS * block
        assert sum(p.numel() for p in trainer.parameters) == numbers
        trainer.run()
        method.end_task(clip.model, task, stage)
        seen += len(names)
        # Units and texts [E], means [E] with a variance and a weight; labels take 8 bytes. The
        # images are float64.
        stored = 8 * (UNITS + 1 + PARTS) * E + 8 * 2 * PARTS + 8 * (UNITS + PARTS)
        assert method.stored_bytes(clip.model) == seen * stored


def test_a_vit_b16s_text_encoder_trains_as_many_numbers_as_the_authors_say():
    layer = AdaptFormerMLP(torch.nn.Linear(512, 512), 512)
    assert not any(p.requires_grad and p.numel() for p in layer.parameters())
    layer.renew()
    assert 12 * sum(p.numel() for p in layer.parameters() if p.requires_grad) == 215_244


@pytest.mark.parametrize("make", [open_clip_model, hf_clip], ids=["open_clip", "hf"])
def test_only_texts_are_adapted_and_a_fresh_bottleneck_changes_nothing(make):
    model, method = make(), build()
    method.setup(model)
    assert set(adapters(model, Adapter)) == set(adapters(model, AdaptFormerMLP)) | {"label_memory"}
    paths = adapters(model, AdaptFormerMLP)
    assert len(paths) == BLOCKS and not any("vis" in path for path in paths)
    for layer in paths.values():
        layer.renew()
        x = torch.randn(1, 2, layer.features)
        layer.take_residual = lambda x=x: x + 1
        with torch.no_grad():
            assert torch.equal(layer(x), layer.base_layer(x))


def test_a_task_out_of_order_is_refused():
    clip, method = learned(0)
    message = "tasks must be learned in order: 0 classes are learned, but this task's begin at 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        begin(clip, method, 1)


def test_a_bottleneck_that_hears_no_norm_says_so():
    layer = AdaptFormerMLP(torch.nn.Linear(4, 4), 4)
    layer.renew()
    message = "AdaptFormerMLP needs what enters the norm before the MLP; call listen(norm) once"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        layer(torch.ones(1, 2, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": 0}, "units must be >= 1, got 0"),
        ({"components": 0}, "components must be >= 1, got 0"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"sharpness": 0.0}, "sharpness must be finite and > 0, got 0.0"),
        ({"strength": -1.0}, "strength must be finite and >= 0, got -1.0"),
        ({"replay": -1.0}, "replay must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(**settings)
