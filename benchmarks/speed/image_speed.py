"""What the X-TAIL harness saves against a loop that does everything anew, on this machine.

    python benchmarks/speed/image_speed.py --out FILE.csv

Three savings are timed, each against the same work without it, in turns: decoded test images that
later rounds of scoring use again (JPEGs of 500 x 375), image features of a frozen model, and
prompts that no trained parameter changes. ViT-B/32, random weights. Medians of some rounds.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from moram import MoRAMConfig, inject
from moram.models.clip import load_clip
from moram.xtail.data.domains import FileSplit
from moram.xtail.images import ImageRows, ImageStore, TestImages, Transforms
from moram.xtail.objective import contrastive

IMAGES, CLASSES, BATCH, ROUNDS = 64, 40, 8, 5


def write_images(folder):
    """Some JPEGs of noise that compresses about as photos do."""
    generator, paths = np.random.default_rng(0), []
    for index in range(IMAGES):
        coarse = generator.integers(0, 256, (47, 63, 3), np.uint8)
        path = folder / f"{index}.jpg"
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return FileSplit(paths, [index % CLASSES for index in range(IMAGES)])


def seconds(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name, plain, saving):
    """A row: medians of both and their ratio, measured in turns after one call of each."""
    plain(), saving()
    pairs = [(seconds(plain), seconds(saving)) for _ in range(ROUNDS)]
    without, with_it = (median(side) for side in zip(*pairs, strict=True))
    row = (name, f"{without:.4f}", f"{with_it:.4f}", f"{without / with_it:.1f}")
    print(*row, flush=True)
    return row


def decoding(split, clip):
    """A round of scoring's decoding, with and without the cache."""
    transforms = Transforms(clip.preprocess)

    def round_of(gib):
        images = TestImages(clip, split, ImageStore(gib), transforms)
        return lambda: [batch.pixels() for batch in images.batches(BATCH)]

    return compare("test images decoded again / kept", round_of(0.0), round_of(1.0))


def features(split, clip):
    """A round of scoring with a frozen model, with and without kept features."""
    store, transforms = ImageStore(1.0), Transforms(clip.preprocess)

    @torch.no_grad()
    def score(images):
        for batch in images.batches(BATCH):
            batch.features()

    plain, kept = (TestImages(clip, split, store, transforms, frozen) for frozen in (False, True))
    return compare(
        "frozen features encoded again / kept", lambda: score(plain), lambda: score(kept)
    )


def prompts(split, clip):
    """A training step of the vision encoder alone, with prompts encoded each time or once."""
    inject(clip.model, MoRAMConfig.preset("xtail", targets="open_clip-vision"))
    store, transforms = ImageStore(1.0), Transforms(clip.preprocess)
    texts = [f"a photo of a thing of kind {index}." for index in range(CLASSES)]
    data = ImageRows(clip, split, texts, 0, store, transforms)

    def step(forget):
        if forget:
            data.fixed_texts = None
        loss, _, _ = contrastive(clip.model, data, torch.arange(BATCH))
        loss.backward()

    name = f"step with {CLASSES} prompts of a frozen encoder each time / once"
    return compare(name, lambda: step(True), lambda: step(False))


def main():
    """Measure all three, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip("ViT-B-32", "random")
    with tempfile.TemporaryDirectory() as folder:
        split = write_images(Path(folder))
        rows = [part(split, clip) for part in (decoding, features, prompts)]
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("what", "without_s", "with_s", "ratio"), *rows])


if __name__ == "__main__":
    main()
