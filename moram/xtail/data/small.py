"""The domains of the preset `small`: drawn ones, scikit-learn's digits, and parts of public sets.

The first six need no files. `mnist10k`, `animals` and `vehicles` are read from the data folder:
MNIST's 10,000 test images, and CIFAR-10 as JPEGs, which the small CLIP was not pretrained on.
"""

import gzip
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, Self

import numpy as np

from .catalog import REAL, SMALL
from .domains import ArraySplit, Domain, to_rgb
from .rendered import DIGITS, GREEK, LETTERS, ODD_FONTS, SHAPES, SYMBOLS, TEXTURES, Style, render

# Images per class of a drawn domain.
TRAIN, TEST = 24, 24

# kind, classes, template, style: none of the styles was seen in pretraining.
_DRAWN = {
    "greek": ("greek", tuple(GREEK), "a photo of the Greek letter {}.", Style(turn=12)),
    "letters": (
        "letter",
        LETTERS,
        "a photo of the letter {}.",
        Style(25, 0.25, 3, 0.12, (0.3, 0.7), ODD_FONTS, clutter=3),
    ),
    "shapes": (
        "shape",
        SHAPES,
        "a sketch of a {}.",
        Style(25, 0.25, 4, 0.1, (0.3, 0.7), outline=True, clutter=4),
    ),
    "symbols": (
        "symbol",
        tuple(SYMBOLS),
        "a photo of a {}.",
        Style(35, 0.3, 4, 0.15, (0.25, 0.6), clutter=4),
    ),
    "textures": (
        "texture",
        TEXTURES,
        "{} texture.",
        Style(20, 0.2, 0, 0.15, (0.15, 0.45), grain=0.12),
    ),
}
_CIFAR = {
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicles": ("airplane", "automobile", "ship", "truck"),
}


def is_small(name: str) -> bool:
    """Whether a dataset's name is one of this file's."""
    return name in SMALL or name in REAL


def load_small(name: str, root: str | Path | None = None) -> Domain:
    """A domain of the preset `small`.

    Args:
        name: of `SMALL` or `REAL`. root: the data folder, for those of `REAL`.
    Returns:
        The same images every time.
    Raises:
        FileNotFoundError: a file of `REAL` is not in root.
        ValueError: it is damaged.
    """
    if name in _DRAWN:
        return _drawn(name)
    if name == "digits":
        return _digits()
    if root is None:
        raise FileNotFoundError(f"{name} is read from files: name their folder, data_dir")
    return _mnist(Path(root)) if name == "mnist10k" else _cifar(name, Path(root))


def _drawn(name: str) -> Domain:
    kind, classes, template, style = _DRAWN[name]
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    splits = []
    for count in (TRAIN, TEST):
        labels = np.arange(len(classes)).repeat(count)
        images = np.stack([render(kind, classes[y], style, generator) for y in labels])
        splits.append(ArraySplit(images, labels, f"{name} (drawn)"))
    train, test = splits
    return Domain(name, classes, template, train, test)


def _digits() -> Domain:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    # The first half and the second are by different writers.
    half = len(images) // 2
    parts = (slice(None, half), slice(half, None, 2))
    train, test = (ArraySplit(images[p], found.target[p], "scikit-learn's digits") for p in parts)
    return Domain("digits", DIGITS, "a scan of the digit {}.", train, test)


def _mnist(root: Path) -> Domain:
    images = _idx(root, "t10k-images-idx3-ubyte", (28, 28))
    labels = _idx(root, "t10k-labels-idx1-ubyte", ())
    if len(images) != len(labels) or len(images) <= 5000:
        raise ValueError(
            f"{root}: MNIST must have as many images as labels, and more than 5000, got "
            f"{len(images)} and {len(labels)}"
        )
    if labels.max() > 9:
        raise ValueError(f"{root}: t10k-labels-idx1-ubyte must hold digits, got {labels.max()}")
    # The two halves are by different writers: school pupils and employees.
    parts = (slice(None, 5000), slice(5000, None, 10))
    train, test = (ArraySplit(images[p], labels[p], "MNIST (test images)") for p in parts)
    classes = tuple(f"{index} - {name}" for index, name in enumerate(DIGITS))
    return Domain("mnist10k", classes, 'a photo of the number: "{}".', train, test)


def _idx(root: Path, stem: str, sizes: tuple[int, ...]) -> np.ndarray:
    """The bytes of an IDX file, [n, *sizes]."""
    places = [f"{base}{stem}{end}" for base in ("mnist/", "MNIST/raw/") for end in (".gz", "")]
    path = next((root / place for place in places if (root / place).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"mnist10k needs {root / 'mnist' / stem}.gz (or without .gz, or in MNIST/raw)"
        )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        # Two zeros, 8 for bytes, the number of dimensions; then their sizes.
        header = np.frombuffer(content, ">i4", 2 + len(sizes)).tolist()
        magic, count, *found = header
        if magic != 0x801 + len(sizes) or count < 0 or found != [*sizes]:
            raise ValueError(f"its header says {header}")
        return np.frombuffer(content, np.uint8, offset=4 * len(header)).reshape(count, *sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no MNIST file: {error}") from error


def _cifar(name: str, root: Path) -> Domain:
    from PIL import Image

    classes, splits = _CIFAR[name], []
    with _Tree(root) as tree:
        for split, each in (("train", 200), ("test", 100)):
            images, labels = [], []
            for label, kind in enumerate(classes):
                for path, content in tree.read(f"{split}/{kind}", each):
                    try:
                        image = to_rgb(Image.open(io.BytesIO(content)))
                    except (OSError, SyntaxError, ValueError) as error:
                        raise ValueError(f"{path} cannot be decoded: {error}") from error
                    if image.size != (32, 32):
                        raise ValueError(f"{path} must be of 32 x 32 pixels, got {image.size}")
                    images.append(np.asarray(image))
                    labels.append(label)
            splits.append(ArraySplit(np.stack(images), labels, f"CIFAR-10 ({name})"))
    train, test = splits
    return Domain(name, classes, "a photo of a {}.", train, test)


class _Tree:
    """The folder cifar10, or the archive cifar10.zip, in a data folder."""

    def __init__(self, root: Path) -> None:
        self.folder, archive = root / "cifar10", root / "cifar10.zip"
        self.zip = None
        if not self.folder.is_dir():
            if not archive.is_file():
                raise FileNotFoundError(
                    f"CIFAR-10 must lie in {self.folder} or {archive}, as "
                    "{train,test}/CLASS/*.jpg"
                )
            try:
                self.zip = zipfile.ZipFile(archive)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{archive} is damaged: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.zip is not None:
            self.zip.close()

    def read(self, folder: str, count: int) -> list[tuple[str | Path, bytes]]:
        """(name, content) of the first JPEGs of a folder."""
        found: list[tuple[str | Path, bytes]]
        if self.zip is None:
            paths = sorted((self.folder / folder).glob("*.jpg"))[:count]
            found = [(path, path.read_bytes()) for path in paths]
        else:
            names = (n for n in self.zip.namelist() if n.startswith(f"{folder}/"))
            names = sorted(name for name in names if name.endswith(".jpg"))[:count]
            found = [(f"{self.zip.filename}: {name}", _unpack(self.zip, name)) for name in names]
        if not found:
            place = self.folder if self.zip is None else self.zip.filename
            raise FileNotFoundError(f"{place} has no JPEGs in {folder}")
        return found


def _unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{archive.filename} is damaged: {error}") from error
