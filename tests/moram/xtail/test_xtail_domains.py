"""Images of every mode and of none, subsets, and how few-shot images are drawn."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from xtail_data import encoded, jpeg

from moram.xtail.data.domains import (
    ArraySplit,
    BadImage,
    Domain,
    FileSplit,
    check_images,
    few_shot,
    skip_bad,
    take,
    to_rgb,
)


def _palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


def _clear_palette():
    image = _palette()
    image.info["transparency"] = 1
    return image


RED, BLUE, WHITE, GRAY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (100, 100, 100)
MODES = {
    "RGB": (Image.new("RGB", (2, 1), RED), RED, RED),
    "1": (Image.new("1", (2, 1), 1), WHITE, WHITE),
    "L": (Image.new("L", (2, 1), 100), GRAY, GRAY),
    # Gray 100, half covering white: 100 * 128/255 + 255 * 127/255 = 177.2
    "LA": (Image.new("LA", (2, 1), (100, 128)), (177, 177, 177), (177, 177, 177)),
    "RGBA": (Image.new("RGBA", (2, 1), (255, 0, 0, 0)), WHITE, WHITE),
    "P": (_palette(), RED, BLUE),
    "P-transparent": (_clear_palette(), RED, WHITE),
    "CMYK": (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), RED, RED),
    # 32896 = 128 * 257; 25700 = 100 * 257.
    "I16": (
        Image.fromarray(np.array([[32896, 25700]], dtype=np.uint16)),
        (128, 128, 128),
        GRAY,
    ),
    "I16-ends": (Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), (0, 0, 0), WHITE),
    "I": (Image.fromarray(np.array([[65535, 25700]], dtype=np.int32)), WHITE, GRAY),
    # A maximum of 255 or less: the numbers are those of 8 bits already.
    "I16-of-8-bits": (
        Image.fromarray(np.array([[255, 100]], dtype=np.uint16)),
        WHITE,
        GRAY,
    ),
    "I-of-8-bits": (Image.fromarray(np.array([[255, 100]], dtype=np.int32)), WHITE, GRAY),
    # 25700 = 100 * 257, stored with the high byte first.
    "I16B": (Image.frombytes("I;16B", (2, 1), bytes([255, 255, 100, 100])), WHITE, GRAY),
    # 0.392 * 255 = 99.96
    "F-up-to-1": (Image.fromarray(np.array([[1.0, 0.392]], dtype=np.float32)), WHITE, GRAY),
    "F-up-to-255": (Image.fromarray(np.array([[255.0, 99.6]], dtype=np.float32)), WHITE, GRAY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, left, right = MODES[mode]
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    for x, wanted in enumerate((left, right)):
        # One step: Pillow rounds blends in its own way.
        assert all(abs(a - b) <= 1 for a, b in zip(rgb.getpixel((x, 0)), wanted, strict=True))


@pytest.mark.parametrize(
    "image, kind, wanted",
    [
        (Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)), "PNG", (128, 128, 128)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", RED),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", WHITE),
        (Image.new("L", (4, 4), 100), "TIFF", GRAY),
        (_palette(), "GIF", RED),
    ],
    ids=["PNG-16-bit", "JPEG-CMYK", "PNG-clear", "TIFF-gray", "GIF-palette"],
)
def test_files_of_every_mode_are_read_as_rgb(tmp_path, image, kind, wanted):
    (tmp_path / "image").write_bytes(encoded(image, kind))
    loaded = FileSplit([tmp_path / "image"], [0]).load(0)
    assert loaded.mode == "RGB"
    assert all(abs(a - b) <= 2 for a, b in zip(loaded.getpixel((0, 0)), wanted, strict=True))


OUT_OF_RANGE = {
    "I-negative": (np.array([[-1, 100]], dtype=np.int32), "-1 to 100"),
    "I-of-17-bits": (np.array([[0, 65536]], dtype=np.int32), "0 to 65536"),
    "F-negative": (np.array([[-0.5, 1.0]], dtype=np.float32), "-0.5 to 1"),
    "F-above-255": (np.array([[0.0, 255.5]], dtype=np.float32), "0 to 255.5"),
    "F-nan": (np.array([[0.0, np.nan]], dtype=np.float32), "nan to nan"),
    "F-inf": (np.array([[0.0, np.inf]], dtype=np.float32), "0 to inf"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_numbers_that_are_no_brightness_are_a_bad_image(tmp_path, case):
    array, found = OUT_OF_RANGE[case]
    path = tmp_path / "image.tiff"
    path.write_bytes(encoded(Image.fromarray(array), "TIFF"))
    with pytest.raises(BadImage) as error:
        FileSplit([path], [0]).load(0)
    rule = {"I": "0 to 255 or to 65535", "F": "0 to 1 or to 255"}[case[0]]
    assert str(error.value) == (
        f"{path}: the brightness of a {case[0]} image must be {rule}, got {found}"
    )


def test_float_images_in_files_are_scaled(tmp_path):
    path = tmp_path / "image.tiff"
    path.write_bytes(encoded(Image.fromarray(np.full((4, 4), 0.392, dtype=np.float32)), "TIFF"))
    assert FileSplit([path], [0]).load(0).getpixel((0, 0)) == GRAY


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    # Tag 274, value 6: show it turned by 90 degrees.
    exif[274] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (16, 8)), exif=exif))
    assert FileSplit([tmp_path / "a.jpg"], [0]).load(0).size == (16, 8)


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>not found</html>", "not an image of a known format"),
    "cut": (jpeg(0, 1)[:-80], ""),
    "cut-png": (encoded(Image.effect_noise((32, 32), 50), "PNG")[:300], ""),
    "absent": (None, "No such file or directory"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_with_the_reason(tmp_path, kind):
    content, reason = BAD[kind]
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage) as error:
        FileSplit([path], [0]).load(0)
    assert str(error.value).startswith(f"{path}: {reason}")
    assert error.value.reason


def test_an_image_too_large_to_decode_is_bad(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(0, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImage, match=r"a\.jpg: Image size \(64 pixels\) exceeds limit"):
        FileSplit([tmp_path / "a.jpg"], [0]).load(0)


def test_bad_images_are_listed_and_can_be_left_out(tmp_path):
    for i, content in enumerate((jpeg(0, 1), b"", jpeg(0, 1), b"no")):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    split = FileSplit([tmp_path / f"{i}.jpg" for i in range(4)], [7, 8, 9, 9])
    bad = [
        (str(tmp_path / "1.jpg"), "the file is empty"),
        (str(tmp_path / "3.jpg"), "not an image of a known format"),
    ]
    assert check_images(split) == bad
    kept, left_out = skip_bad(split)
    assert kept.labels == [7, 9]
    assert left_out == bad
    assert check_images(kept) == []


def test_a_subset_reads_the_images_at_its_indices():
    split = ArraySplit(np.arange(5, dtype=np.uint8).reshape(5, 1, 1), [0, 1, 2, 3, 4], "toy")
    nested = take(take(split, [4, 2, 2, 0]), [3, 0, 1])
    assert nested.labels == [0, 4, 2]
    assert [nested.load(i).getpixel((0, 0))[0] for i in range(3)] == [0, 4, 2]
    assert nested.name(1) == "toy[4]"
    with pytest.raises(IndexError, match=r"indices must be in \[0, 5\), got 5"):
        take(split, [0, 5])


def test_arrays_may_be_tensors_and_have_colours():
    images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    images[..., 2] = 255
    assert ArraySplit(images, [0], "toy").load(0).getpixel((0, 0)) == BLUE


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 4, 4), dtype=np.float32), r"must be uint8 .*, got float32 \[2, 4, 4\]"),
        (np.zeros((2, 3, 4, 4), dtype=np.uint8), r"got uint8 \[2, 3, 4, 4\]"),
        (np.zeros((3, 4, 4), dtype=np.uint8), "3 images must have as many labels, got 2"),
    ],
    ids=["float", "channels-first", "labels"],
)
def test_arrays_of_another_kind_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        ArraySplit(images, [0, 1], "toy")


def toy(name="toy", per_class=(30, 30, 30)):
    """A domain whose training images are never read; the images of a class are spread out."""
    labels = [label for label, count in enumerate(per_class) for _ in range(count)]
    random.Random(0).shuffle(labels)
    split = FileSplit([f"{i}.jpg" for i in range(len(labels))], labels)
    return Domain(name, tuple("abcdefgh"[: len(per_class)]), "a photo of a {}.", split, split)


def test_a_draw_has_its_shots_of_each_class_in_order_and_none_twice():
    domain = toy()
    indices, short = few_shot(domain, 16, seed=42)
    assert [domain.train.labels[i] for i in indices] == [0] * 16 + [1] * 16 + [2] * 16
    assert len(set(indices)) == 48
    assert short == {}


def test_a_draw_depends_on_nothing_that_ran_before():
    first = few_shot(toy(), 16, seed=42)
    random.seed(1)
    random.random()
    torch.manual_seed(3)
    few_shot(toy("other"), 5, seed=42)
    assert few_shot(toy(), 16, seed=42) == first


def test_a_draw_leaves_global_random_streams_alone():
    random.seed(1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    few_shot(toy(), 16, seed=42)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    "other", [("toy", 43), ("other", 42)], ids=["another-seed", "another-dataset"]
)
def test_draws_differ_between(other):
    name, seed = other
    assert few_shot(toy(), 16, seed=42).indices != few_shot(toy(name), 16, seed=seed).indices


def test_a_draw_is_the_same_in_another_process():
    code = (
        "from moram.xtail.data.domains import *;"
        "s = FileSplit([str(i) for i in range(90)], [0, 1, 2] * 30);"
        "print(few_shot(Domain('toy', ('a', 'b', 'c'), '{}', s, s), 16, 42).indices)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    split = FileSplit([str(i) for i in range(90)], [0, 1, 2] * 30)
    domain = Domain("toy", ("a", "b", "c"), "{}", split, split)
    assert json.loads(ran.stdout) == few_shot(domain, 16, seed=42).indices


@pytest.mark.parametrize("shots", [16, 17])
def test_a_class_with_too_few_images_gives_all_and_repeats_some(shots):
    domain = toy(per_class=(30, 5, 30))
    indices, short = few_shot(domain, shots, seed=0)
    assert short == {"b": 5}
    assert Counter(domain.train.labels[i] for i in indices) == {0: shots, 1: shots, 2: shots}
    assert len({i for i in indices if domain.train.labels[i] == 1}) == 5


def test_a_class_with_just_enough_images_is_not_short():
    assert few_shot(toy(per_class=(16, 16)), 16, seed=0).short == {}


def test_a_class_without_training_images_is_named():
    with pytest.raises(
        ValueError, match="toy has no training image of 1 of its 3 classes: 'b'; add"
    ):
        few_shot(toy(per_class=(20, 0, 20)), 16, seed=0)


@pytest.mark.parametrize("shots", [0, -1])
def test_at_least_one_shot(shots):
    with pytest.raises(ValueError, match=f"shots must be at least 1, got {shots}"):
        few_shot(toy(), shots, seed=0)
