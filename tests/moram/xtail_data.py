"""A tiny tree of X-TAIL's datasets in CoOp's layout: 8x8 images, the true numbers of classes."""

import colorsys
import io
import json
import pickle
import struct
from pathlib import Path

import pytest
from PIL import Image

# name: classes, folder, image folder in it, split file, the first classes' names
COOP = {
    "caltech101": (100, "caltech-101", "101_ObjectCategories", "Caltech101", ("face", "leopard")),
    "dtd": (47, "dtd", "images", "DescribableTextures", ("banded", "blotchy")),
    "eurosat": (10, "eurosat", "2750", "EuroSAT", ("Annual Crop Land", "Forest")),
    "oxford_flowers": (102, "oxford_flowers", "jpg", "OxfordFlowers", ("pink primrose",)),
    "food101": (101, "food-101", "images", "Food101", ("apple_pie", "baby_back_ribs")),
    "oxford_pets": (37, "oxford_pets", "images", "OxfordPets", ("abyssinian", "american_bulldog")),
    "stanford_cars": (196, "stanford_cars", "", "StanfordCars", ("2000 AM General Hummer SUV",)),
    "sun397": (397, "sun397", "SUN397", "SUN397", ("abbey", "airplane cabin")),
}
TEN = ["aircraft", "caltech101", "dtd", "eurosat", "oxford_flowers"]
TEN += ["food101", "mnist", "oxford_pets", "stanford_cars", "sun397"]
AIRCRAFT = ("707-320", "727-200")


def write_tree(root, names=TEN, train=1, test=1):
    """Write datasets with some images per class; returns the root."""
    for name in names:
        if name in COOP:
            write_coop(root, name, train, test)
        else:
            {"aircraft": write_aircraft, "mnist": write_mnist, "cifar100": write_cifar100}[name](
                root, train, test
            )
    return Path(root)


def write_coop(root, name, train=1, test=1):
    """A dataset with a split file; returns the file's path."""
    count, folder, images, split, first = COOP[name]
    folder = Path(root, folder)
    classes = [*first, *(f"{name}_{i}" for i in range(len(first), count))]
    rows = {"train": [], "val": [["not/there.jpg", 0, classes[0]]], "test": []}
    for label, text in enumerate(classes):
        (folder / images / f"c{label}").mkdir(parents=True)
        content = jpeg(label, count)
        for part, number in (("train", train), ("test", test)):
            for i in range(number):
                path = f"c{label}/{part}{i}.jpg"
                (folder / images / path).write_bytes(content)
                rows[part].append([path, label, text])
    # The order of rows says nothing about labels.
    rows["train"].reverse()
    file = folder / f"split_zhou_{split}.json"
    file.write_text(json.dumps(rows))
    return file


def write_aircraft(root, train=1, test=1):
    folder = Path(root, "fgvc_aircraft")
    (folder / "images").mkdir(parents=True)
    variants = [*AIRCRAFT, *(f"A{i} plane" for i in range(2, 100))]
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for part, number in (("train", train), ("val", 1), ("test", test)):
        lines = []
        for label, text in enumerate(variants):
            for i in range(number):
                name = f"{part[:2]}{label:03d}{i}"
                (folder / "images" / f"{name}.jpg").write_bytes(jpeg(label, 100))
                lines.append(f"{name} {text}")
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")


def write_mnist(root, train=1, test=1):
    folder = Path(root, "MNIST", "raw")
    folder.mkdir(parents=True)
    for part, number in (("train", train), ("t10k", test)):
        labels = bytes(range(10)) * number
        images = b"".join(bytes([25 * label]) * 28 * 28 for label in labels)
        header = struct.pack(">IIII", 0x803, len(labels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        header = struct.pack(">II", 0x801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)


def write_cifar100(root, train=1, test=1):
    """CIFAR-100's files, which torchvision reads only where `without_checksums`."""
    import numpy as np

    folder = Path(root, "cifar-100-python")
    folder.mkdir(parents=True)
    for part, number in (("train", train), ("test", test)):
        labels = list(range(100)) * number
        data = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    classes = ["apple", "aquarium_fish", *(f"thing_{i}" for i in range(2, 100))]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": classes}))


def write_folders(root, name, classes, train=2, test=1, template=None):
    """A dataset of one's own: NAME/{train,test}/CLASS/*.png."""
    for part, number in (("train", train), ("test", test)):
        for label, text in enumerate(classes):
            folder = Path(root, name, part, text)
            folder.mkdir(parents=True)
            for i in range(number):
                (folder / f"{i}.jpg").write_bytes(jpeg(label, len(classes)))
    if template is not None:
        Path(root, name, "template.txt").write_text(template)


def jpeg(label, count):
    """An 8x8 JPEG in a colour of its class."""
    colour = colorsys.hsv_to_rgb(label / count, 1, 1)
    return encoded(Image.new("RGB", (8, 8), tuple(round(255 * part) for part in colour)))


def encoded(image, kind="JPEG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def without_checksums(monkeypatch):
    """torchvision takes CIFAR-100 files of any content."""
    from torchvision.datasets import CIFAR100

    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", meta)
