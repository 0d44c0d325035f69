"""The domains of the preset `small`: what is drawn, and what is read from files."""

import gzip
import hashlib
import random
import re
import struct
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from xtail_data import encoded

from moram.xtail.data.rendered import (
    GREEK,
    ODD_FONTS,
    PLAIN_FONTS,
    SYMBOLS,
    Style,
    render,
    world_style,
)
from moram.xtail.data.small import REAL, SMALL, is_small, load_small
from moram.xtail.pretrain import all_things

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
GIVEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
VEHICLES = ["airplane", "automobile", "ship", "truck"]
GREEK_TEXT = "a photo of the Greek letter"
# Number of classes, the first and the last prompt, images of training and test.
EXPECTED = {
    "symbols": (32, "a photo of a heart.", "a photo of a pointing hand.", 768, 768),
    "letters": (26, "a photo of the letter A.", "a photo of the letter Z.", 624, 624),
    "digits": (10, "a scan of the digit zero.", "a scan of the digit nine.", 898, 450),
    "greek": (10, f"{GREEK_TEXT} alpha.", f"{GREEK_TEXT} omega.", 240, 240),
    "shapes": (10, "a sketch of a circle.", "a sketch of a half circle.", 240, 240),
    "textures": (10, "horizontal stripes texture.", "zigzag texture.", 240, 240),
}
THINGS = {
    kind: [name for k, name, _ in all_things() if k == kind]
    for kind in ("letter", "digit", "symbol", "shape", "texture")
} | {"greek": list(GREEK)}
CLEAR = {"turn": 0, "stretch": 0, "shift": 0, "noise": 0}


@pytest.fixture(scope="module")
def domains():
    return {name: load_small(name) for name in EXPECTED}


def pixels(split):
    """All images as they are loaded."""
    return np.stack([np.asarray(split.load(i)) for i in range(len(split))])


def checksum(domain):
    digest = hashlib.sha256(repr(domain.prompts).encode())
    for split in (domain.train, domain.test):
        digest.update(bytes(split.labels))
        digest.update(pixels(split).tobytes())
    return digest.hexdigest()


def test_a_fresh_process_makes_the_same_images_in_any_order(domains):
    code = "import sys; sys.path[:0] = sys.argv[1:]; from test_xtail_small import *\n"
    code += "torch.manual_seed(5); np.random.seed(5)\n"
    code += "for name in reversed(EXPECTED): print(name, checksum(load_small(name)))"
    command = [sys.executable, "-c", code, str(ROOT), *map(str, Path(__file__).parents[:2])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == {name: checksum(domain) for name, domain in domains.items()}


def test_drawing_leaves_the_global_generators_alone():
    def states():
        return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())

    before = states()
    for name in ("greek", "textures", "digits"):
        load_small(name)
    render("letter", "A", world_style(np.random.default_rng(1)), np.random.default_rng(2))
    assert states() == before


@pytest.mark.parametrize("kind", THINGS)
def test_each_thing_is_an_image_of_more_than_one_colour(kind):
    for thing in THINGS[kind]:
        for seed in range(4):
            generator = np.random.default_rng(seed)
            style = world_style(generator) if seed else Style(**CLEAR, gray=True)
            image = render(kind, thing, style, generator)
            assert image.shape == (28, 28, 3) and image.dtype == np.uint8
            # Without noise in the first: it would hide that nothing is there.
            assert image.std((0, 1)).max() > 2, (thing, seed)
            assert seed or (image == image[..., :1]).all()


@pytest.mark.parametrize("kind", THINGS)
def test_different_things_of_a_kind_look_different(kind):
    fonts = PLAIN_FONTS + ODD_FONTS if kind in ("letter", "digit") else PLAIN_FONTS[:1]
    for font, outline in product(fonts, (False, True) if kind == "shape" else (False,)):
        style = Style(**CLEAR, fonts=(font,), outline=outline, gray=True, contrast=(1, 1))
        images = [render(kind, thing, style, np.random.default_rng(7)) for thing in THINGS[kind]]
        for i, one in enumerate(images):
            for j in range(i):
                # An italic E has a bar more than an F: some of 784 pixels, by half of the range.
                far = np.abs(one.astype(int) - images[j]).max(2) > 127
                assert far.sum() >= 5, (font, THINGS[kind][i], THINGS[kind][j])


def test_fonts_have_every_character_that_is_drawn_with_them():
    import matplotlib
    from fontTools import ttLib as ttlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    needed = dict.fromkeys(PLAIN_FONTS + ODD_FONTS, plain)
    for name in ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Oblique"):
        needed[name] = needed.get(name, "") + "αβγδθλπσφω"
    needed["DejaVuSans"] += "".join(SYMBOLS.values())
    for name, text in needed.items():
        have = ttlib.TTFont(folder / f"{name}.ttf").getBestCmap()
        assert [character for character in text if ord(character) not in have] == [], name


def test_the_stream_has_its_six_domains_and_the_files_have_three():
    assert sorted(SMALL) == sorted(EXPECTED) and REAL == ("mnist10k", "animals", "vehicles")
    assert all(is_small(name) for name in (*SMALL, *REAL))
    assert not is_small("mnist") and not is_small("cifar100")


@pytest.mark.parametrize("name", EXPECTED)
def test_domains_have_their_classes_prompts_and_counts(domains, name):
    domain = domains[name]
    count, first, last, train, test = EXPECTED[name]
    assert domain.name == name and len(set(domain.classes)) == count
    assert (domain.prompts[0], domain.prompts[-1]) == (first, last)
    assert [len(domain.train), len(domain.test)] == [train, test]
    for split in (domain.train, domain.test):
        assert set(split.labels) == set(range(count))
        if name != "digits":
            assert {split.labels.count(label) for label in range(count)} == {24}
    assert pixels(domain.train).shape[1:] == ((8, 8, 3) if name == "digits" else (28, 28, 3))


@pytest.mark.parametrize("name", EXPECTED)
def test_no_image_is_in_training_and_test(domains, name):
    train, test = (pixels(split) for split in (domains[name].train, domains[name].test))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_captions_name_every_class_but_the_greek_letters(domains):
    captions = "\n".join(text for _, _, texts in all_things() for text in texts)
    for name, domain in domains.items():
        for text in domain.classes:
            # "pi" is in "picture": whole words.
            is_named = re.search(rf"\b{re.escape(text)}\b", captions, re.IGNORECASE) is not None
            assert is_named == (name != "greek"), text


def test_digits_are_sklearns_scaled_to_bytes(domains):
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    domain = domains["digits"]
    assert raw.shape == (1797, 64) and domain.classes == tuple(GIVEN)
    assert domain.train.labels == labels[:898].tolist()
    assert domain.test.labels == labels[898::2].tolist()
    # Sixteenths of 255; 8 of 16, 127.5, becomes 128.
    steps = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    for split, rows in ((domain.train, raw[:898]), (domain.test, raw[898::2])):
        expected = np.array(steps)[rows.astype(int)].reshape(-1, 8, 8, 1).repeat(3, 3)
        assert np.array_equal(pixels(split), expected)


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
