"""The small CLIP of the preset `small`: pretrained once, on drawn images, and kept in a cache.

    python -m moram.xtail.pretrain

The recipe is this file and `rendered`; the weights (31 MB, most of them the text embedding) are not
in the repository. open_clip reads the folder as local-dir:FOLDER.
"""

import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.progress import Log
from ..models.clip import MEAN, STD
from .data.rendered import DIGITS, LETTERS, SHAPES, SIZE, SYMBOLS, TEXTURES, render, world_style

# Changes whenever the recipe does: a cache of another recipe is not used.
VERSION = 2
WEIGHTS = "open_clip_model.safetensors"
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 7,
        "layers": 4,
        "width": 128,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}
# Kind, its things, and what captions call one of them.
WORLD = (
    ("letter", LETTERS, ("letter {}", "capital letter {}")),
    ("digit", DIGITS, ("digit {}", "number {}", 'number: "{index} - {}"')),
    ("symbol", tuple(SYMBOLS), ("{}", "{}", "{} symbol")),
    ("shape", SHAPES, ("{}", "{} shape")),
    ("texture", TEXTURES, ("{}", "{} texture", "pattern of {}")),
)
FRAMES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "a scan of the {}.",
    "an image of the {}.",
    "{}.",
    "the {}",
)


@dataclass(frozen=True)
class Recipe:
    """How the small CLIP is pretrained.

    Args:
        images: drawn once; every step takes some of them, moved by a pixel or two.
        steps, batch, lr: of AdamW, with a warm-up over a twentieth of the steps and a cosine.
        seed: of the images, their captions, the weights and the batches.
    """

    images: int = 100_000
    steps: int = 2000
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0


def small_clip(
    cache: str | Path | None = None, log: Log = print, recipe: Recipe | None = None
) -> Path:
    """The folder of the small CLIP, pretrained on the first call.

    Args:
        cache: folder to keep it in; by default ~/.cache/moram.
        log: called with lines of text. recipe: None = the default one.
    """
    recipe = Recipe() if recipe is None else recipe
    cache = Path.home() / ".cache" / "moram" if cache is None else Path(cache)
    target = cache / f"xtail-small-clip-v{VERSION}"
    if recipe != Recipe():
        own = "-".join(map(str, asdict(recipe).values()))
        target = cache / f"xtail-small-clip-v{VERSION}-{own}"
    if (target / WEIGHTS).is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    log("pretraining the small CLIP, once (by default 10 to 20 minutes)")
    model = pretrain(recipe, log)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        work = Path(folder) / "model"
        work.mkdir()
        save(model, work, recipe)
        # One rename: a crash leaves no half model behind. Another process may have been as fast.
        if not (target / WEIGHTS).is_file():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(work, target)
    return target


def save(model: nn.Module, folder: Path, recipe: Recipe) -> None:
    """Write a model as open_clip's local-dir reads it."""
    from safetensors.torch import save_file

    config = {
        "model_cfg": MODEL,
        "preprocess_cfg": {"size": SIZE, "mean": MEAN, "std": STD},
        "recipe": asdict(recipe),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)


def draw_world(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of all things in the styles of the world, and what they show.

    Returns:
        (images [n, 28, 28, 3] uint8, things [n] numbers of `all_things`).
    """
    things, generator = all_things(), np.random.default_rng(seed)
    # Kinds with few things show each of them more often.
    kinds = generator.integers(len(WORLD), size=count)
    first = np.cumsum([0] + [len(names) for _, names, _ in WORLD])
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    shown = np.empty(count, np.int64)
    for i, kind in enumerate(kinds):
        shown[i] = generator.integers(first[kind], first[kind + 1])
        group, name, _ = things[shown[i]]
        images[i] = render(group, name, world_style(generator), generator)
    return images, shown


def all_things() -> list[tuple[str, str, list[str]]]:
    """(kind, name, captions) of every thing."""
    found = []
    for kind, names, phrases in WORLD:
        for index, name in enumerate(names):
            calls = [phrase.format(name, index=index) for phrase in phrases]
            found.append((kind, name, [f.format(call) for call in calls for f in FRAMES]))
    return found


def pretrain(recipe: Recipe, log: Log = print) -> nn.Module:
    """Train the small CLIP from scratch with the contrastive loss; returns the model.

    A batch shows many things more than once: pairs of the same thing are no negatives.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    start = time.perf_counter()
    pixels, shown = (torch.from_numpy(a) for a in draw_world(recipe.images, recipe.seed))
    tokenizer = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    captions = [tokenizer(texts) for _, _, texts in all_things()]
    log(f"drew {recipe.images} images in {time.perf_counter() - start:.0f} s")
    torch.manual_seed(recipe.seed)
    model = open_clip.CLIP(**MODEL).train()
    # Random embeddings tell the few words of the captions apart as well as trained ones.
    embedding = model.get_submodule("token_embedding")
    assert isinstance(embedding, nn.Embedding)
    nn.init.normal_(embedding.weight, std=0.1)
    embedding.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        rows = torch.randint(len(pixels), (recipe.batch,), generator=generator)
        images = pixels[rows].permute(0, 3, 1, 2).float() / 255
        images = (_moved(images, generator) - mean) / std
        things = shown[rows]
        texts = torch.stack([_pick(captions[thing], generator) for thing in things.tolist()])
        warm = min(1.0, (step + 1) / (recipe.steps / 20))
        rate = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        image, text = model.encode_image(images, True), model.encode_text(texts, True)
        logits = model.logit_scale.exp() * image @ text.T
        same = things[:, None] == things[None]
        logits = logits.masked_fill(same & ~torch.eye(len(rows), dtype=torch.bool), float("-inf"))
        target = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0 or step == recipe.steps - 1:
            seconds = time.perf_counter() - start
            log(f"step {step} of {recipe.steps}: loss {loss.item():.3f}, {seconds:.0f} s")
    return model.eval()


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to a pixel, with its border repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dx, dy = torch.randint(3, (2,), generator=generator).tolist()
    return padded[..., dy : dy + SIZE, dx : dx + SIZE]


def _pick(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[int(torch.randint(len(rows), (), generator=generator))]


if __name__ == "__main__":
    print(small_clip())
