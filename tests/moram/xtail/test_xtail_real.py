"""The domains of the preset `small` that are read from files: MNIST's test images and CIFAR-10."""

import gzip
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from xtail_data import encoded

from moram.xtail.data.small import REAL, load_small

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
GIVEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
VEHICLES = ["airplane", "automobile", "ship", "truck"]


def pixels(split):
    """All images as they are loaded."""
    return np.stack([np.asarray(split.load(i)) for i in range(len(split))])


MNIST_IMAGES, MNIST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def mnist_files(count=5011):
    """Image i holds i in its first two bytes, and is of class i % 10."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    labels = bytes(i % 10 for i in range(count))
    return {
        MNIST_IMAGES: struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes(),
        MNIST_LABELS: struct.pack(">II", 0x801, count) + labels,
    }


def write_mnist(root, files, folder="mnist", packed=True):
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        path = root / folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    return root


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
def test_mnist_is_halved_and_every_tenth_image_of_the_second_half_tested(tmp_path, folder, packed):
    domain = load_small("mnist10k", str(write_mnist(tmp_path, mnist_files(), folder, packed)))
    texts = [f'a photo of the number: "{index} - {name}".' for index, name in enumerate(GIVEN)]
    assert domain.prompts == texts
    assert domain.train.labels == [i % 10 for i in range(5000)]
    assert domain.test.labels == [0, 0]
    train, test = pixels(domain.train).astype(int), pixels(domain.test).astype(int)
    assert (train[:, 0, 0, 0] * 256 + train[:, 0, 1, 0] == np.arange(5000)).all()
    assert (test[:, 0, 0, 0] * 256 + test[:, 0, 1, 0]).tolist() == [5000, 5010]


# What is wrong: the file, and how it is made from the right one.
WRONG = {
    "images-magic": lambda old: struct.pack(">I", 0x801) + old[4:],
    "labels-magic": lambda old: struct.pack(">I", 0x803) + old[4:],
    "images-cut": lambda old: old[:-1],
    "images-long": lambda old: old + b"0",
    "images-header": lambda old: old[:9],
    "images-empty": lambda old: b"",
    "labels-ten": lambda old: old[:-1] + bytes([10]),
    "labels-short": lambda old: struct.pack(">II", 0x801, 5010) + old[8:-1],
}


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_mnist_files_are_refused(tmp_path, case, packed):
    files, name = mnist_files(), MNIST_IMAGES if "images" in case else MNIST_LABELS
    files[name] = WRONG[case](files[name])
    write_mnist(tmp_path, files, packed=packed)
    with pytest.raises(ValueError, match="5010" if case == "labels-short" else name) as error:
        load_small("mnist10k", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_damaged_gzip_of_mnist_is_named(tmp_path, damage):
    path = write_mnist(tmp_path, mnist_files()) / "mnist" / f"{MNIST_IMAGES}.gz"
    content, middle = path.read_bytes(), path.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-100], "flipped": flipped}.get(damage, b"no gzip"))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_small("mnist10k", tmp_path)


@pytest.mark.parametrize("left_out", [MNIST_IMAGES, MNIST_LABELS])
def test_a_missing_mnist_file_is_named(tmp_path, left_out):
    files = mnist_files()
    del files[left_out]
    write_mnist(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "mnist" / left_out))):
        load_small("mnist10k", tmp_path)


def cifar_files(train=2, test=1):
    """Archive name: JPEG of one gray that says its class, in an order of no meaning."""
    return {
        f"{split}/{kind}/{i:04}.jpg": encoded(Image.new("L", (32, 32), 20 * (label + 1)))
        for split, count in (("train", train), ("test", test))
        for label, kind in enumerate(sorted(ANIMALS + VEHICLES))
        for i in reversed(range(count))
    }


def write_cifar(root, files, packed, how=zipfile.ZIP_STORED):
    path = root / "cifar10.zip"
    if packed:
        with zipfile.ZipFile(path, "w", how) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    for name, content in files.items():
        path = root / "cifar10" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "cifar10"


both_ways = pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])


@both_ways
def test_cifar_has_its_classes_and_the_first_images_of_each(tmp_path, packed):
    files = cifar_files(201, 101)
    # White: the last ones, and what is no JPEG, must not be read.
    white = encoded(Image.new("L", (32, 32), 255))
    last = re.compile("train/.*/0200.jpg|test/.*/0100.jpg")
    files |= {name: white for name in files if last.match(name)}
    files["train/bird/0000.txt"] = b"text"
    write_cifar(tmp_path, files, packed)
    for name, kinds in (("animals", ANIMALS), ("vehicles", VEHICLES)):
        domain = load_small(name, str(tmp_path))
        assert domain.prompts == [f"a photo of a {kind}." for kind in kinds]
        for split, each in ((domain.train, 200), (domain.test, 100)):
            assert split.labels == [label for label in range(len(kinds)) for _ in range(each)]
            found, order = pixels(split), sorted(ANIMALS + VEHICLES)
            grays = [20 * (order.index(kind) + 1) for kind in kinds]
            assert found.shape == (each * len(kinds), 32, 32, 3)
            assert np.abs(found.mean((1, 2, 3)) - np.repeat(grays, each)).max() < 2


@both_ways
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_jpeg_is_named(tmp_path, packed, damage):
    files, name = cifar_files(), "test/dog/0000.jpg"
    files[name] = {"cut": files[name][:-200], "empty": b"", "text": b"not a JPEG"}[damage]
    place = write_cifar(tmp_path, files, packed)
    with pytest.raises(ValueError, match=name) as error:
        load_small("animals", tmp_path)
    assert str(place) in str(error.value)
    assert len(load_small("vehicles", tmp_path).test) == 4


@pytest.mark.parametrize("damage", ["content", "deflated", "cut", "text", "empty"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    how = zipfile.ZIP_DEFLATED if damage == "deflated" else zipfile.ZIP_STORED
    path = write_cifar(tmp_path, cifar_files(), True, how)
    content = path.read_bytes()
    if damage in ("content", "deflated"):
        # In the first image that is read: what is unpacked has another checksum, if any.
        place = content.index(b"train/bird/0000.jpg") + 25
        content = content[:place] + b"\xff" * 30 + content[place + 30 :]
    path.write_bytes({"cut": content[:-40], "text": b"text", "empty": b""}.get(damage, content))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_small("animals", tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_missing_files_name_the_places_where_they_belong(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="data_dir"):
        load_small(name)
    places = "mnist/t10k-images-idx3-ubyte.gz" if name == "mnist10k" else "cifar10 cifar10.zip"
    with pytest.raises(FileNotFoundError) as error:
        load_small(name, tmp_path)
    words = re.split("[ ,]", str(error.value))
    assert all(f"{tmp_path / place}" in words for place in places.split())


@pytest.mark.parametrize("name", REAL)
def test_real_files_have_the_sizes_of_their_sources(name):
    if not (SHARED / ("mnist" if name == "mnist10k" else "cifar10.zip")).exists():
        pytest.skip(f"{SHARED} does not hold it")
    domain = load_small(name, SHARED)
    sizes = {"mnist10k": (5000, 500), "animals": (1200, 600), "vehicles": (800, 400)}[name]
    assert (len(domain.train), len(domain.test)) == sizes
    train, test = pixels(domain.train), pixels(domain.test)
    assert train.shape[1:] == test.shape[1:] == ((28, 28, 3) if name == "mnist10k" else (32, 32, 3))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    # How MNIST's test labels begin.
    assert name != "mnist10k" or domain.train.labels[:10] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
