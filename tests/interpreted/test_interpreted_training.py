"""Three tasks learned on the Triton backend: the loss curve is that of the torch backend.

Both run in float32 and are held against the reference backend in float64. A curve of nine losses is
one draw of rounding errors, so the plain run is the worse of two: the torch backend, and the
reference in float32.
"""

import pytest
import torch
from support import assert_within_budget
from tiny_models import hf_clip, images, language_model, small_config, token_ids
from torch.nn.functional import cross_entropy

import moram
from moram import adapters
from moram_kernels import fused_ops

TASKS, STEPS = 3, 3
# One of each kind of projection, in both towers.
CLIP_TARGETS = (
    "text_model.encoder.layers.1.self_attn.q_proj",
    "text_model.encoder.layers.0.mlp.fc2",
    "vision_model.encoder.layers.0.self_attn.v_proj",
    "vision_model.encoder.layers.1.mlp.fc1",
)


def language_loss(model, task):
    ids = token_ids(2, 8, seed=task)
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def clip_loss(model, task):
    pixels = images(3).roll(task, 2).to(model.dtype)
    logits = model(input_ids=token_ids(3, 6, seed=task), pixel_values=pixels).logits_per_image
    pairs = torch.arange(3)
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def set_current(model, generator):
    """The same atoms for every dtype: drawn in float32."""
    with torch.no_grad():
        for adapter in adapters(model).values():
            for table in (adapter.bank.current_keys, adapter.bank.current_values):
                drawn = torch.randn(table.shape, generator=generator)
                table.copy_(drawn * table.shape[1] ** -0.5)


def curve(build, loss_of, targets, rate, backend, dtype):
    """Losses of all steps, in order [TASKS * STEPS]."""
    model, generator = build().to(dtype), torch.Generator().manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    config = small_config(backend=backend, temperature=0.1, targets=targets, atom_dtype=name)
    moram.inject(model, config, generator=generator)
    model.train()
    losses = []
    for task in range(TASKS):
        if task:
            moram.grow(model, generator=generator)
        set_current(model, torch.Generator().manual_seed(task))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=rate)
        for _ in range(STEPS):
            loss = loss_of(model, task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "setting",
    [
        (language_model, language_loss, ("q_proj", "down_proj"), 0.3),
        (hf_clip, clip_loss, CLIP_TARGETS, 0.02),
    ],
    ids=["llama", "clip"],
)
def test_three_tasks_follow_the_loss_curve_of_the_torch_backend(setting, monkeypatch):
    taken = set()
    original = fused_ops.plan

    def plan(*args, **more):
        chosen = original(*args, **more)
        taken.add(chosen.path)
        return chosen

    monkeypatch.setattr(fused_ops, "plan", plan)
    high = curve(*setting, "reference", torch.float64)
    plain = [curve(*setting, backend, torch.float32) for backend in ("torch", "reference")]
    assert not taken
    actual = curve(*setting, "triton", torch.float32)
    assert taken and "torch" not in taken
    # It learns: the errors compared are those of a descent, task by task.
    assert (high.view(TASKS, STEPS)[:, -1] < high.view(TASKS, STEPS)[:, 0]).all()
    assert_within_budget(actual, max(plain, key=lambda low: (low - high).square().mean()), high)
