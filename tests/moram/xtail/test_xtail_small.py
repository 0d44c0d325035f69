"""The domains of the preset `small` that are drawn."""

import hashlib
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

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
GIVEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
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
