"""MoE-Adapters in a stream of tasks: saving, which task an image is given to, refusals."""

from itertools import pairwise

import pytest
import torch
from moe_adapter_runs import (
    BLOCKS,
    CLASSES,
    EXPERTS,
    MODELS,
    PROMPTS,
    WIDTH,
    Batch,
    Stage,
    build,
    clip_of,
    continue_steps,
    domain,
    every_model,
    learn,
    learned,
    save_alexnet,
    states,
    steps,
)
from tiny_models import Mlp, assert_equal, hf_clip, open_clip_model

from moram import adapters
from moram.layers.base import Adapter
from moram.layers.moe_adapters import PARTS
from moram.methods.moe_adapters import MoEAdapters


@every_model
def test_frozen_experts_and_earlier_routers_are_bitwise_unchanged_by_later_tasks(kind):
    clip, method = learned(kind, 0)
    frozen, routers = [], []
    for index in range(3):
        learn(method, clip, index)
        layers = method.layers(clip.model)
        assert len(layers) == BLOCKS
        parts = {
            path: {
                e: [rows[e].detach().clone() for rows in map(layer._rows, PARTS)]
                for e in layer.frozen.nonzero().flatten().tolist()
            }
            for path, layer in layers.items()
        }
        frozen.append(parts)
        routers.append({p: torch.cat([a.routers, a.router]).detach() for p, a in layers.items()})
    for path in frozen[0]:
        # Two a task, of five.
        assert [len(end[path]) for end in frozen] == [2, 4, 5]
        for earlier, later in pairwise(frozen):
            for expert, tensors in earlier[path].items():
                assert_equal(tensors, later[path][expert])
                assert tensors[3].abs().max() > 0, "it must have been trained"
        last = routers[-1][path]
        assert len(last) == 3 and all(router.abs().max() > 0 for router in last)
        for index in range(2):
            assert torch.equal(routers[index][path], last[: index + 1])


@every_model
def test_only_free_experts_and_the_current_router_train(kind):
    clip, method = learned(kind, 1)
    before = {n: p.clone() for n, p in clip.model.named_parameters() if "base_layer" in n}
    method.begin_task(clip.model, 1, None)
    trained = {
        f"{path}.{name}"
        for path in method.layers(clip.model)
        for name in (*PARTS, "router", "noise")
    }
    found = {n for n, p in clip.model.named_parameters() if p.requires_grad}
    assert found == trained
    steps(clip, domain(1))
    assert before
    after = {n: p.detach() for n, p in clip.model.named_parameters() if n in before}
    assert_equal(before, after)


def test_every_expert_may_freeze_and_the_router_still_trains():
    clip, method = learned(tasks=3, freeze=3)
    method.begin_task(clip.model, 3, None)
    layer = next(iter(method.layers(clip.model).values()))
    assert layer.frozen.all()
    steps(clip, domain(3))
    assert layer.router.abs().max() > 0


def test_equal_seeds_give_equal_runs():
    ends = [learned(tasks=2, seed=seed) for seed in (1, 1, 2)]
    found = [(states(clip.model), method.state_dict()) for clip, method in ends]
    assert_equal(list(found[0]), list(found[1]))
    path = next(iter(found[0][0]))
    assert not torch.equal(found[0][0][path]["down"], found[2][0][path]["down"])


def test_stored_bytes_are_experts_routers_and_selectors():
    clip, method = learned(tasks=2)
    # Experts, three routers' worth (two, and the current one's noise), counts and frozen.
    block = 4 * EXPERTS * (2 * WIDTH * 32 + WIDTH + 32) + 4 * 3 * 32 * EXPERTS + 9 * EXPERTS
    # 32 features through 8, with biases, mean, spread and threshold.
    selector = 4 * (2 * 8 * 32 + 8 + 32 + 32 + 2)
    assert method.stored_bytes(clip.model) == BLOCKS * block + 2 * selector


@every_model
def test_a_run_that_was_saved_within_a_task_goes_on_bit_for_bit(kind, tmp_path):
    clip, method = learned(kind, 3)
    expected = [states(clip.model), method.state_dict()]

    clip, method = learned(kind, 1)
    pixels = domain(1)
    method.begin_task(clip.model, 1, None)
    optimizer = steps(clip, pixels, stop=2)
    saved = {
        "adapters": states(clip.model),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # Another seed: all that was drawn must come from the file.
    clip, method = clip_of(MODELS[kind]()), build(seed=7)
    method.setup(clip.model)
    found = adapters(clip.model, Adapter)
    assert len(found) == BLOCKS
    for path, adapter in found.items():
        adapter.load_adapter_state(saved["adapters"][path])
    method.load_state_dict(saved["method"])
    parameters = [p for p in clip.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    optimizer.load_state_dict(saved["optimizer"])
    continue_steps(clip, pixels, optimizer, 2, 4)
    method.end_task(clip.model, 1, Stage(clip, pixels))
    learn(method, clip, 2)
    assert_equal([states(clip.model), method.state_dict()], expected)


@torch.no_grad()
def test_a_loaded_run_scores_as_the_saved_one(tmp_path):
    clip, method = learned(tasks=2)
    batch = Batch(torch.cat([domain(i, 3, seed=1) for i in range(3)]))
    expected = method.classifier(clip, PROMPTS)(batch)
    saved = states(clip.model), method.state_dict()
    clip, method = learned(tasks=0)
    for path, adapter in adapters(clip.model, Adapter).items():
        adapter.load_adapter_state(saved[0][path])
    method.load_state_dict(saved[1])
    assert torch.equal(method.classifier(clip, PROMPTS)(batch), expected)


def test_a_state_of_another_method_is_refused():
    clip, method = learned(tasks=0)
    layer = next(iter(method.layers(clip.model).values()))
    with pytest.raises(ValueError, match="another method"):
        layer.load_adapter_state({"lora_A": torch.zeros(1)})


@torch.no_grad()
def scores_by_hand(clip, method, pixels, task):
    """Scores with one task's router in both encoders."""
    for layer in method.layers(clip.model).values():
        layer.use(task)
    return clip.logits(clip.encode_image(pixels), clip.encode_text(PROMPTS))


@every_model
@torch.no_grad()
def test_a_mixed_batch_is_routed_image_by_image(kind):
    # Between the errors of a task's own images and those of strangers.
    clip, method = learned(kind, 2, threshold=5e-4)
    # Two of the first domain, three of the second, one that belongs to none.
    pixels = torch.cat([domain(0, 2, seed=1), domain(1, 3, seed=1), domain(5, 1, seed=1)])
    pixels, tasks = pixels[[0, 2, 5, 1, 3, 4]], [0, 1, -1, 0, 1, 1]
    scores = method.classifier(clip, PROMPTS)(Batch(pixels))
    assert scores.shape == (6, CLASSES)
    options = {task: scores_by_hand(clip, method, pixels, task) for task in (-1, 0, 1)}
    for row, task in enumerate(tasks):
        torch.testing.assert_close(scores[row], options[task][row])
        for other in {-1, 0, 1} - {task}:
            assert (options[other][row] - options[task][row]).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_is_given_to_one_task_if_so_asked():
    clip, method = learned(tasks=2, selection="batch", threshold=1e9)
    pixels = torch.cat([domain(0, 1, seed=1), domain(1, 5, seed=1)])
    scores = method.classifier(clip, PROMPTS)(Batch(pixels))
    torch.testing.assert_close(scores, scores_by_hand(clip, method, pixels, 1))
    method.selection = "image"
    assert not torch.equal(method.classifier(clip, PROMPTS)(Batch(pixels)), scores)


@every_model
@torch.no_grad()
def test_a_task_that_is_told_is_used_whatever_the_images_look_like(kind):
    clip, method = learned(kind, 2, selection="given")
    assert method.needs_task_id and not learned(kind, 0)[1].needs_task_id
    batch = Batch(torch.cat([domain(i, 2, seed=1) for i in (0, 1, 5)]))
    classify = method.classifier(clip, PROMPTS)
    # The third task is not learned yet.
    for task, router in ((1, 1), (0, 0), (2, -1)):
        method.select(clip.model, task)
        expected = scores_by_hand(clip, method, batch.pixels(), router)
        torch.testing.assert_close(classify(batch), expected)


@torch.no_grad()
def test_what_an_image_is_given_to_does_not_depend_on_its_batch():
    clip, method = learned(tasks=2, threshold=5e-4)
    pixels = torch.cat([domain(i, 3, seed=1) for i in (0, 1, 5)])
    classify = method.classifier(clip, PROMPTS)
    together = classify(Batch(pixels))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classify(Batch(pixels[order])), together[order])
    for row in range(len(pixels)):
        alone = classify(Batch(pixels[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row])


@every_model
@torch.no_grad()
def test_images_of_no_task_and_all_images_before_the_first_get_the_original_scores(kind):
    # Frozen as the other is: torch chooses its attention kernel by that.
    plain, pixels = clip_of(MODELS[kind]().requires_grad_(False)), domain(5, 4)
    expected = plain.logits(plain.encode_image(pixels), plain.encode_text(PROMPTS))
    for tasks in (0, 2):
        clip, method = learned(kind, tasks)
        assert torch.equal(method.classifier(clip, PROMPTS)(Batch(pixels)), expected)


@torch.no_grad()
def test_scoring_leaves_the_router_in_use_as_it_was():
    clip, method = learned(tasks=2)
    method.begin_task(clip.model, 2, None)
    method.classifier(clip, PROMPTS)(Batch(domain(0, 2)))
    assert [layer.task for layer in method.layers(clip.model).values()] == [2] * BLOCKS


def test_the_base_features_are_those_without_any_router():
    # Equal training images give equal selectors, whatever the experts have learned.
    _, method = learned(tasks=2)
    errors = [method.selector.errors(clip_of(hf_clip()).encode_image(domain(i))) for i in (0, 1)]
    for task, found in enumerate(errors):
        assert found.argmin(1).tolist() == [task] * len(found)
        mean = method.selector.tasks[task]["mean"]
        base = clip_of(hf_clip()).encode_image(domain(task))
        # The mean of four fifths of them.
        assert (mean - base.mean(0)).abs().max() < 0.02


@torch.no_grad()
def test_selection_works_on_alexnets_features(tmp_path):
    settings = {"selector_features": "alexnet", "selector_lr": 0.03, "threshold": 1e9}
    clip, method = learned(tasks=2, alexnet=save_alexnet(tmp_path), **settings)
    for task in (0, 1):
        pixels = domain(task, 4, seed=1)
        scores = method.classifier(clip, PROMPTS)(Batch(pixels))
        torch.testing.assert_close(scores, scores_by_hand(clip, method, pixels, task))
    bounded = method.selector.tasks[0]
    assert bounded["spread"] == 1 and not bounded["mean"].any()


def test_other_weights_than_alexnets_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="alexnet must be torchvision's weights"):
        build(selector_features="alexnet", alexnet=tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "experts must be >= 1, got 0"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"freeze": -1}, "freeze must be >= 0, got -1"),
        ({"scale": 0}, "scale must be finite and > 0, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"selection": "task"}, "selection must be one of image, batch, given, got 'task'"),
        ({"selector_features": "dino"}, "selector_features must be one of clip, alexnet"),
        ({"selector_features": "alexnet"}, "alexnet must be a file"),
        ({"alexnet": "file.pth"}, "alexnet must be a file"),
        ({"selector_width": 0}, "selector_width must be >= 1, got 0"),
        ({"selector_steps": 0}, "selector_steps must be >= 1, got 0"),
        ({"selector_lr": 0.0}, "selector_lr must be finite and > 0, got 0.0"),
        ({"threshold": -1.0}, "threshold must be >= 0 or None, got -1.0"),
        ({"quantile": 0.0}, r"quantile must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEAdapters(**settings)


def test_models_without_such_blocks_are_refused_and_left_alone():
    scaled = open_clip_model(ls_init_value=0.1)
    ours = open_clip_model()
    build().setup(ours)
    late = open_clip_model()
    late.transformer.resblocks[1].attn.batch_first = False
    for model, message in (
        (Mlp(), "Mlp has none in its image encoder"),
        (hf_clip().vision_model, "none in its image encoder"),
        (scaled, "scales its MLP's output"),
        (ours, "it has some already"),
        (late, "batch_first"),
    ):
        before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            build().setup(model)
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(after[n].requires_grad == flag for n, (flag, _) in before.items())
