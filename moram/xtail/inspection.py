"""What `moram inspect` reads of a run of moram xtail: images, and the prompts of their classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..harness.inspection.run import Choice, Inputs, Looker
from ..inject import adapters
from ..inspection import Reading
from .data.domains import Domain, take
from .images import TestImages, Transforms
from .report import REPORT
from .run import VISION, XtailRun
from .settings import XtailSettings

if TYPE_CHECKING:
    from ..harness.progress import Log

# What the places are that an image encoder reads, and those of the text encoder: its first token,
# which opens every text, the others up to the one that closes it, that one, and the rest.
IMAGE_KINDS = ("class token", "patch")
TEXT_KINDS = ("start", "word", "end", "padding")


class XtailLooker(Looker):
    """`Looker` of moram xtail. Both encoders read what they read when a run is scored."""

    report = REPORT
    splits = ("test", "train")
    without = ("last", "text")

    def find(self, settings: XtailSettings, names: tuple[str, ...], choice: Choice) -> ClipInputs:
        data = settings.data_dir if choice.data is None else str(choice.data)
        own = replace(settings, datasets=names, data_dir=data, eval_limit=None)
        return ClipInputs(XtailRun(own, log=lambda line: None), choice)


class ClipInputs(Inputs):
    """`Inputs` of some domains.

    Args:
        run: over these domains, of which nothing is learned here. choice: the split is "test" (what
            a run scores: test images, or those held out) or "train" (the few that were drawn).
    """

    kinds = (*IMAGE_KINDS, *TEXT_KINDS)

    def __init__(self, run: XtailRun, choice: Choice) -> None:
        self.run, self.choice = run, choice
        self.stream: list[Domain] = run.make_plan().stream
        self.what = f"at most {choice.limit} images a domain and the prompts of its classes"

    def load(self, log: Log) -> nn.Module:
        self.run.log = log
        self.run.load()
        return self.run.model

    def batches(self) -> dict[str, Iterator[Reading]]:
        # Before anyone listens to the adapters.
        kinds = image_kinds(self._places())
        return {domain.name: self._batches(domain, kinds) for domain in self.stream}

    def _batches(self, domain: Domain, kinds: Tensor) -> Iterator[Reading]:
        clip, size = self.run.clip, self.run.settings.eval_batch
        for batch in self._images(domain).batches(size):
            pixels = batch.pixels()
            yield Reading(partial(clip.encode_image, pixels), kinds.expand(len(pixels), -1))
        for ids in clip.tokens(domain.prompts).split(size):
            yield Reading(partial(clip.encode_text, ids), text_kinds(ids))

    def _images(self, domain: Domain) -> TestImages:
        """So many images of the split, evenly spaced: they are sorted by class."""
        split = domain.test if self.choice.split == "test" else domain.train
        transforms = Transforms(self.run.clip.preprocess)
        if self.run.settings.skip_bad:
            bad = self.run.store.find_bad(split, transforms.test)
            split = take(split, [row for row in range(len(split)) if row not in bad])
        count = min(self.choice.limit, len(split))
        split = take(split, [i * len(split) // count for i in range(count)])
        return TestImages(self.run.clip, split, self.run.store, transforms)

    @torch.no_grad()
    def _places(self) -> int:
        """How many places of an image the adapters read; 0 where none of them reads an image."""
        clip, seen = self.run.clip, []
        size = clip.preprocess.size
        found = adapters(clip.model)
        handles = [
            found[path].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-2]))
            for path in found
            if path.startswith(VISION)
        ]
        clip.encode_image(clip.parameter.new_zeros(1, 3, size, size))
        for handle in handles:
            handle.remove()
        return seen[0] if seen else 0


def image_kinds(places: int) -> Tensor:
    """The kind of each place of an image, [places], int64: the class token lies first."""
    kinds = torch.full((places,), IMAGE_KINDS.index("patch"))
    kinds[:1] = IMAGE_KINDS.index("class token")
    return kinds


def text_kinds(ids: Tensor) -> Tensor:
    """The kind of each place of token ids [C, L], int64: the largest id closes a text, as CLIP's
    pooling has it."""
    place = torch.arange(ids.shape[1])
    end = ids.cpu().argmax(1, keepdim=True)
    kinds = 1 + (place >= end).long() + (place > end).long()
    kinds[:, 0] -= (end[:, 0] > 0).long()
    return kinds + len(IMAGE_KINDS)


LOOKER = XtailLooker()
