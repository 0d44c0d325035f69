"""What a dataset is to X-TAIL: images by index, labels, class names, a template. Few-shot draws.

Where datasets lie on disk, and how they are read, is in datasets.py.
"""

import hashlib
import os
import random
import struct
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image


class BadImage(ValueError):
    """An image that cannot be decoded; the message names it and the reason."""

    name: str
    reason: str

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.name, self.reason)


class Split(Protocol):
    """Images by index, and a class index for each."""

    labels: list[int]

    def __len__(self) -> int: ...

    def name(self, i: int, /) -> str:
        """What messages call image i."""
        ...

    def load(self, i: int, /) -> Image.Image:
        """Image i in RGB."""
        ...


class FileSplit:
    """Images in files, read when asked for.

    Args:
        paths: of the images, in order.
        labels: a class index for each.
    """

    paths: list[str]
    labels: list[int]

    def __init__(self, paths: Iterable[str | Path], labels: Iterable[int]) -> None:
        self.paths, self.labels = [os.fspath(path) for path in paths], [int(y) for y in labels]
        _check_lengths(self.paths, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What messages call image i: its path."""
        return self.paths[i]

    def load(self, i: int) -> Image.Image:
        """Image i in RGB, by the rules of `to_rgb`.

        The first frame of an animation; EXIF orientation is ignored, as in CoOp and torchvision.

        Raises:
            BadImage: the file is missing, empty, truncated or not an image.
        """
        path = self.paths[i]
        try:
            with Image.open(path) as image:
                return to_rgb(image)
        except _DECODING_ERRORS as error:
            # Pillow says only "cannot identify image file" of an empty one.
            empty = os.path.isfile(path) and os.path.getsize(path) == 0
            raise BadImage(path, "the file is empty" if empty else _reason(error)) from error


class ArraySplit:
    """Images in memory.

    Args:
        images: uint8 [N, H, W] or [N, H, W, 3], an array or a tensor.
        labels: a class index for each.
        name: what messages call the array.
    """

    images: np.ndarray[Any, Any]
    labels: list[int]

    def __init__(self, images: ArrayLike, labels: Iterable[int], name: str) -> None:
        images = np.asarray(images)
        if images.dtype != np.uint8 or not (
            images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        ):
            raise ValueError(
                "images must be uint8 [N, H, W] or [N, H, W, 3], got "
                f"{images.dtype} {list(images.shape)}"
            )
        self.images, self.labels, self._name = images, [int(y) for y in labels], name
        _check_lengths(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """What messages call image i."""
        return f"{self._name}[{i}]"

    def load(self, i: int) -> Image.Image:
        """Image i in RGB."""
        return to_rgb(Image.fromarray(self.images[i]))


class Subset:
    """Some images of a split, under the same interface. Made by `take`."""

    split: Split
    indices: list[int]
    labels: list[int]

    def __init__(self, split: Split, indices: Iterable[int]) -> None:
        self.split, self.indices = split, [int(i) for i in indices]
        wrong = [i for i in self.indices if not 0 <= i < len(split)]
        if wrong:
            raise IndexError(f"indices must be in [0, {len(split)}), got {wrong[0]}")
        self.labels = [split.labels[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """What messages call image i."""
        return self.split.name(self.indices[i])

    def load(self, i: int) -> Image.Image:
        """Image i in RGB."""
        return self.split.load(self.indices[i])


class Domain(NamedTuple):
    """One dataset of a stream. A label is an index into `classes`; `template` has one `{}`.

    passed_over: files and folders in its folder that are not read, hidden ones aside.
    """

    name: str
    classes: tuple[str, ...]
    template: str
    train: Split
    test: Split
    passed_over: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """The text of each class, in order of labels."""
        return [self.template.format(name) for name in self.classes]


def empty_classes(domain: Domain, split: Split) -> list[str]:
    """The names of a domain's classes of which a split has no image."""
    present = set(split.labels)
    return [name for label, name in enumerate(domain.classes) if label not in present]


def check_covered(domain: Domain) -> None:
    """Raise ValueError unless each class has images to learn from and images to be scored on."""
    _check_split(domain, "training", domain.train)
    _check_split(domain, "test", domain.test)


def _check_split(domain: Domain, kind: str, split: Split) -> None:
    empty = empty_classes(domain, split)
    if empty:
        raise ValueError(
            f"{domain.name} has no {kind} image of {len(empty)} of its {len(domain.classes)} "
            f"classes: {', '.join(map(repr, empty[:5]))}{', ...' if len(empty) > 5 else ''}; "
            "add some, or leave the class out"
        )


class Shots(NamedTuple):
    """A few-shot draw: indices into `train`, and {class: images} of classes with too few."""

    indices: list[int]
    short: dict[str, int]


def origin(split: Split, i: int) -> tuple[Split, int]:
    """The split that really holds image i of a split, and its index there."""
    while isinstance(split, Subset):
        split, i = split.split, split.indices[i]
    return split, i


def take(split: Split, indices: Iterable[int]) -> Subset:
    """The images at some indices of a split (repeats allowed), as a split."""
    return Subset(split, indices)


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy of a PIL image of any mode.

    Grayscale and palette images become RGB, CMYK is converted as Pillow does (without a colour
    profile), transparency is laid on white. Whole numbers (modes "I" and "I;16") are scaled from
    0..65535 to 8 bits if one of them is above 255; floats (mode "F") from 0..1 if none is above 1.
    Pillow itself would clip them.

    Raises:
        ValueError: numbers beyond these ranges; their meaning cannot be told.
    """
    if image.mode[0] in "IF":
        return Image.fromarray(_to_eight_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    """The numbers of a PIL image of mode "I", "I;16" or "F" as brightness 0..255, uint8."""
    numbers = np.asarray(image).astype(np.float64)
    least, most = numbers.min(), numbers.max()
    small, large = (1, 255) if image.mode == "F" else (255, 65535)
    # Written so that a NaN is refused.
    if not (least >= 0 and most <= large):
        raise ValueError(
            f"the brightness of a {image.mode[0]} image must be 0 to {small} or to {large}, got "
            f"{least:.7g} to {most:.7g}"
        )
    scale = 255 / (small if most <= small else large)
    return (numbers * scale + 0.5).astype(np.uint8)


def few_shot(domain: Domain, shots: int, seed: int) -> Shots:
    """Draw some training images of each class.

    The draw depends on the seed, the dataset's name and its training labels alone, never on what
    was drawn before. A class with fewer images than `shots` gives all of them, and the rest are
    drawn from them again, with replacement, so that every class has the same weight.

    Args:
        shots: images per class, >= 1.
    Returns:
        `Shots`: indices into domain.train, sorted by class, and the classes with too few images.
    Raises:
        ValueError: shots < 1, or a class without any training image.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    by_class: list[list[int]] = [[] for _ in domain.classes]
    for i, label in enumerate(domain.train.labels):
        by_class[label].append(i)
    _check_split(domain, "training", domain.train)
    # Python's hash() of a text changes with each process.
    digest = hashlib.sha256(f"{seed}:{domain.name}".encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "big"))
    indices: list[int] = []
    short: dict[str, int] = {}
    for name, found in zip(domain.classes, by_class, strict=True):
        if len(found) < shots:
            short[name] = len(found)
            indices += found + generator.choices(found, k=shots - len(found))
        else:
            indices += generator.sample(found, shots)
    return Shots(indices, short)


def skip_bad(split: Split) -> tuple[Split, list[tuple[str, str]]]:
    """Decode every image; returns the split without the bad ones, and [(name, reason)] of those."""
    good, bad = [], []
    for i in range(len(split)):
        try:
            split.load(i)
            good.append(i)
        except BadImage as error:
            bad.append((error.name, error.reason))
    return (take(split, good) if bad else split), bad


def check_images(split: Split) -> list[tuple[str, str]]:
    """Decode every image; returns [(name, reason)] of those that cannot be."""
    return skip_bad(split)[1]


# What Pillow raises for damaged files, by format. OSError includes UnidentifiedImageError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_lengths(images: Sized, labels: Sized) -> None:
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images must have as many labels, got {len(labels)}")
