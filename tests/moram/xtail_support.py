"""A tiny CLIP, a few small domains and settings for runs over them. No tests here."""

import colorsys
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from xtail_data import encoded

from moram.methods import METHODS
from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.run import run_xtail
from moram.xtail.settings import make_settings

# Domain: its classes, in the order of the folders. Nine classes in all.
DOMAINS = {
    "fruit": ("fig", "lime", "plum", "quince"),
    "birds": ("auk", "emu", "ibis"),
    "tools": ("awl", "saw"),
}
NAMES = tuple(DOMAINS)
TRAIN, TEST, SIDE = 5, 4, 16
TEMPLATES = {"birds": "a drawing of the {}."}
# What X-TAIL does not take.
REFUSED = {"task-lora": "must be told the task", "in-context": "is for language models"}
TAKEN = tuple(name for name in METHODS if name not in REFUSED)
# Rows of R, where they are fewer than datasets: no order is learned.
ROWS = {"zero-shot": 1, "joint": 1}
STEPS = 6
# What makes a method small enough for the tiny CLIP.
SMALL_ARGS = {
    "moram": {"temperature": 0.3, "threshold": 0.0, "value_scale": 4.0},
    "codyra": {"alpha": 16, "max_kappa": 0.005},
    "moe-adapters": {
        "experts": 4,
        "width": 4,
        "scale": 2.0,
        "selector_width": 8,
        "selector_steps": 20,
    },
    "rail-primal": {"width": 64, "batch": 5},
    "tree-lora": {},
}
VOCABULARY, CONTEXT = 512, 12
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "image_size": SIDE,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


def tokenize(texts):
    """A number for each word; the end is the largest number, where CLIP looks for it."""
    ids = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in enumerate(texts):
        words = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in text.split()]
        line = [VOCABULARY - 2, *words[: CONTEXT - 2], VOCABULARY - 1]
        ids[row, : len(line)] = torch.tensor(line)
    return ids


def tiny_model(seed=16):
    """A random open_clip CLIP whose inputs are strong enough to tell words and colours apart."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(model.visual.conv1.weight, std=0.3)
    return model.eval()


def tiny_clip(seed=16):
    """`tiny_model` as runs take it."""
    return Clip(tiny_model(seed), tokenize, Preprocess(SIDE, MEAN, STD))


def write_backbone(folder, **changes):
    """Save a tiny CLIP with open_clip's own tokenizer; returns it as a backbone's name."""
    import open_clip
    from safetensors.torch import save_file

    config = {**MODEL, **changes}
    config["text_cfg"] = config["text_cfg"] | {"vocab_size": 49408, "context_length": 16}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder = Path(folder)
    folder.mkdir(parents=True)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": MEAN, "std": STD}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return f"local-dir:{folder}"


def write_domains(root, names=NAMES, train=TRAIN, test=TEST):
    """Folders of noisy squares, a colour for each class; returns the root as text."""
    for name in names:
        classes = DOMAINS[name]
        for split, count in (("train", train), ("test", test)):
            for label, text in enumerate(classes):
                for i in range(count):
                    path = Path(root, name, split, text, f"{i}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(picture(name, label, f"{split}{i}"))
        if name in TEMPLATES:
            Path(root, name, "template.txt").write_text(TEMPLATES[name])
    return str(root)


def picture(name, label, which):
    """A PNG whose colour says its class and domain, with noise of its own."""
    hue = (label + 0.3 * NAMES.index(name)) / len(DOMAINS[name])
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, 1 - 0.3 * NAMES.index(name), 1)) * 255
    noise = np.random.default_rng(zlib.crc32(f"{name} {label} {which}".encode()))
    pixels = 0.75 * colour + 0.25 * noise.integers(0, 256, (SIDE, SIDE, 3))
    return encoded(Image.fromarray(pixels.astype(np.uint8)), "PNG")


def quick(data, out, **changes):
    """What makes a run take a second."""
    return {
        "backbone": "ViT-B-16",
        "pretrained": "auto",
        "data_dir": str(data),
        "out": str(out),
        "datasets": NAMES,
        "shots": 3,
        "rank": 2,
        "lr": 0.01,
        "iterations": STEPS,
        "batch_size": 4,
        "eval_batch": 5,
        "seed": 0,
        "cache_gib": 0.1,
        "workers": 1,
        "threads": 1,
        "device": "cpu",
        "quiet": True,
    } | changes


def settings_for(data, out, method="moram", **changes):
    """Settings of a run over the three domains."""
    own = {"method_args": SMALL_ARGS[method]} if method in SMALL_ARGS else {}
    return make_settings("paper", method, changes=[quick(data, out, **own), changes])


def run(data, out, method="moram", stop=lambda: False, log=print, clip=None, **changes):
    """A run with a tiny CLIP of its own; returns its results."""
    settings = settings_for(data, out, method, **changes)
    return run_xtail(settings, log, stop, tiny_clip() if clip is None else clip)


def answers(out, number, i, names=NAMES):
    """What a run wrote of a stage's answers to a dataset."""
    path = Path(out) / "predictions" / f"results-{number}-{i}-{names[i]}.json"
    return json.loads(path.read_text())


def steps_of(out):
    """Stage, step, loss and rate of every step, as written."""
    lines = (Path(out) / "steps.csv").read_text().splitlines()
    return [line.split(",")[:4] for line in lines[1:]]
