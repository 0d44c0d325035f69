"""Tiny CLIPs that learn with MoE-Adapters, shared by its tests. No tests here."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import hf_clip, open_clip_model, token_ids

from moram import adapters
from moram.layers.base import Adapter
from moram.methods.moe_adapters import MoEAdapters
from moram.models.clip import MEAN, STD, Clip, Preprocess

MODELS = {
    "open_clip": open_clip_model,
    "open_clip-custom-text": lambda: open_clip_model("CustomTextCLIP"),
    "hf": hf_clip,
}
every_model = pytest.mark.parametrize("kind", MODELS)
EXPERTS, WIDTH, CLASSES = 5, 3, 4
# Two blocks in each encoder.
BLOCKS = 4


def build(**more):
    settings = {"experts": EXPERTS, "width": WIDTH, "selector_width": 8, "selector_steps": 60}
    return MoEAdapters(**(settings | more))


def clip_of(model):
    return Clip(model, None, Preprocess(32, MEAN, STD))


def domain(number, count=20, seed=0):
    """Images that share a pattern, but for noise."""
    pattern = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(100 + number))
    noise = torch.Generator().manual_seed(1000 * seed + number)
    return 2 * pattern + 0.3 * torch.randn(count, 3, 32, 32, generator=noise)


class Stage:
    """A task's training images, as hooks get them."""

    def __init__(self, clip, pixels):
        self.clip, self.pixels = clip, pixels

    def batches(self, size):
        for pixels in self.pixels.split(size):
            yield pixels, torch.arange(len(pixels)) % CLASSES


class Batch:
    """Images to score."""

    def __init__(self, pixels):
        self._pixels = pixels

    def pixels(self):
        return self._pixels


PROMPTS = token_ids(CLASSES, 8)


def steps(clip, pixels, stop=4):
    """Training steps, each seeded by its number alone; returns the optimiser."""
    parameters = [p for p in clip.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    return continue_steps(clip, pixels, optimizer, 0, stop)


@torch.enable_grad()
def continue_steps(clip, pixels, optimizer, start, stop):
    clip.model.train()
    for number in range(start, stop):
        torch.manual_seed(number)
        scores = clip.logits(clip.encode_image(pixels), clip.encode_text(PROMPTS))
        F.cross_entropy(scores, torch.arange(len(pixels)) % CLASSES).backward()
        optimizer.step()
        optimizer.zero_grad()
    clip.model.eval()
    return optimizer


def learn(method, clip, index, count=4):
    """One task of the domain with that number."""
    pixels = domain(index)
    method.begin_task(clip.model, index, Stage(clip, pixels))
    steps(clip, pixels, stop=count)
    method.end_task(clip.model, index, Stage(clip, pixels))


def learned(kind="hf", tasks=2, **more):
    """A model after some tasks: its clip, and the method."""
    method, clip = build(**more), clip_of(MODELS[kind]())
    method.setup(clip.model)
    for index in range(tasks):
        learn(method, clip, index)
    return clip, method


def states(model):
    return {
        path: {name: t.clone() for name, t in a.adapter_state().items()}
        for path, a in adapters(model, Adapter).items()
    }


def save_alexnet(folder):
    """Random weights of AlexNet's convolutions, named as torchvision names them."""
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    generator, state = torch.Generator().manual_seed(0), {}
    for place, (out, into, side) in shapes.items():
        weight = torch.randn(out, into, side, side, generator=generator)
        state[f"features.{place}.weight"] = weight * math.sqrt(2 / (into * side * side))
        state[f"features.{place}.bias"] = torch.zeros(out)
    path = folder / "alexnet.pth"
    torch.save(state, path)
    return path
