"""Which datasets are read, and how; which are refused, and with which words."""

import json
import re

import pytest
from xtail_data import TEN, without_checksums, write_coop, write_folders, write_tree

from moram.xtail.data.datasets import load_domain, load_domains, missing, offsets, shared_names

# A fixture, used by name.
__all__ = ["without_checksums"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("xtail"))


@pytest.fixture(scope="module")
def domains(tree):
    return load_domains(TEN, tree)


def test_the_joint_label_space_of_the_ten_datasets(domains):
    assert [domain.name for domain in domains] == TEN
    assert offsets(domains) == [0, 100, 200, 247, 257, 359, 460, 470, 507, 703]
    assert sum(len(domain.classes) for domain in domains) == 1100


@pytest.mark.parametrize(
    "name, label, prompt",
    [
        ("aircraft", 0, "a photo of a 707-320, a type of aircraft."),
        ("aircraft", 2, "a photo of a A2 plane, a type of aircraft."),
        ("caltech101", 1, "a photo of a leopard."),
        ("dtd", 0, "banded texture."),
        (
            "eurosat",
            0,
            "a centered satellite photo of the Annual Crop Land satellite location.",
        ),
        ("oxford_flowers", 0, "a photo of a pink primrose, a type of flower."),
        ("food101", 0, "a photo of a apple_pie, a type of food."),
        ("mnist", 0, 'a photo of the number: "number: "0 - zero"".'),
        ("mnist", 9, 'a photo of the number: "number: "9 - nine"".'),
        ("oxford_pets", 1, "a photo of a american_bulldog, a type of pet."),
        ("stanford_cars", 0, "a photo of a 2000 AM General Hummer SUV."),
        ("sun397", 1, "a photo of a airplane cabin."),
    ],
)
def test_prompts_are_those_of_the_published_code(domains, name, label, prompt):
    assert domains[TEN.index(name)].prompts[label] == prompt


def test_underscores_become_spaces_where_asked(tree):
    domain = load_domain("oxford_pets", tree, spaces=True)
    assert domain.prompts[1] == "a photo of a american bulldog, a type of pet."


def test_labels_are_those_of_the_split_file(domains):
    food = domains[TEN.index("food101")]
    # The rows of train are in reverse order.
    assert food.train.labels == list(range(100, -1, -1))
    assert food.test.labels == list(range(101))
    assert food.train.name(0).endswith("food-101/images/c100/train0.jpg")
    assert food.train.load(0).mode == "RGB"
    assert food.train.load(0).size == (8, 8)


def test_aircraft_trains_on_the_train_list_alone(domains):
    assert len(domains[0].train) == 100
    assert all("/tr" in path for path in domains[0].train.paths)
    assert all("/te" in path for path in domains[0].test.paths)


def test_mnist_is_rgb(domains):
    mnist = domains[TEN.index("mnist")]
    # Digit 3 is written as gray 75.
    assert mnist.test.labels[3] == 3
    assert mnist.test.load(3).getpixel((5, 5)) == (75, 75, 75)
    assert mnist.test.load(3).size == (28, 28)


def test_cifar100_is_read_through_torchvision(tmp_path, without_checksums):
    write_tree(tmp_path, ["cifar100"])
    domain = load_domain("cifar100", tmp_path)
    assert len(domain.classes) == 100
    assert domain.prompts[1] == "a photo of a aquarium fish."
    assert domain.train.load(7).getpixel((0, 0)) == (7, 7, 7)


def test_cifar100_of_other_content_is_refused(tmp_path):
    write_tree(tmp_path, ["cifar100"])
    with pytest.raises(ValueError, match=r"cifar-100-python is damaged \(.*cs\.toronto\.edu"):
        load_domain("cifar100", tmp_path)


@pytest.mark.parametrize(
    "name, found, moved",
    [
        ("aircraft", "fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        ("caltech101", "caltech-101", "caltech101"),
        ("dtd", "dtd", "dtd/dtd"),
        ("oxford_flowers", "oxford_flowers", "flowers-102"),
        ("oxford_pets", "oxford_pets", "oxford-iiit-pet"),
        ("mnist", "MNIST", "mnist/MNIST"),
    ],
)
def test_folders_of_the_published_code_are_found(tmp_path, name, found, moved):
    write_tree(tmp_path / "a", [name])
    target = tmp_path / "b" / moved
    target.parent.mkdir(parents=True)
    (tmp_path / "a" / found).rename(target)
    assert missing(name, tmp_path / "b") == []
    load_domain(name, tmp_path / "b").train.load(0)


def test_sun397_directly_in_its_folder_is_found(tmp_path):
    split = write_coop(tmp_path, "sun397")
    (tmp_path / "sun397" / "SUN397").rename(tmp_path / "SUN397")
    split.rename(tmp_path / "SUN397" / split.name)
    assert load_domain("sun397", tmp_path).train.load(0).mode == "RGB"


def test_a_complete_folder_is_preferred_to_one_without_split_file(tmp_path):
    write_coop(tmp_path, "caltech101")
    (tmp_path / "caltech-101").rename(tmp_path / "caltech101")
    (tmp_path / "caltech-101" / "101_ObjectCategories").mkdir(parents=True)
    assert missing("caltech101", tmp_path) == []


def test_any_folder_is_a_domain(tmp_path):
    write_folders(tmp_path, "birds", ["blue_jay", "Auk"], train=3, template="a {} in a tree.\n")
    (tmp_path / "birds" / "train" / "Auk" / "notes.txt").write_text("no image")
    domain = load_domain("birds", tmp_path)
    assert domain.classes == ("Auk", "blue jay")
    assert domain.prompts == ["a Auk in a tree.", "a blue jay in a tree."]
    assert domain.train.labels == [0, 0, 0, 1, 1, 1]
    assert domain.test.labels == [0, 1]


def test_a_folder_without_template_has_the_common_one(tmp_path):
    write_folders(tmp_path, "birds", ["auk"])
    assert load_domain("birds", tmp_path).prompts == ["a photo of a auk."]


# Refusals


def test_all_missing_datasets_are_named_at_once(tmp_path):
    write_tree(tmp_path, ["dtd", "eurosat"])
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_domains(["dtd", "eurosat", "mnist", "oxford_pets"], tmp_path)
    message = str(error.value)
    assert message.startswith("3 of 4 datasets cannot be read: dtd: missing: ")
    assert f"{tmp_path}/dtd/split_zhou_DescribableTextures.json | mnist: missing: " in message
    assert f"| oxford_pets: missing: {tmp_path}/oxford_pets/images, " in message
    assert "eurosat" not in message
    assert message.endswith(f"`moram xtail check-data {tmp_path}` says where each comes from")


def test_what_is_missing_has_its_place_and_origin(tmp_path):
    images, split = missing("dtd", tmp_path)
    assert images.path == tmp_path / "dtd" / "images"
    assert images.origin == "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
    assert split.path == tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    assert "drive.google.com/file/d/1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x" in split.origin


def test_a_root_that_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_domains(["dtd"], tmp_path / "nowhere")


@pytest.mark.parametrize("names", [[], ["dtd", "mnist", "dtd"]], ids=["none", "twice"])
def test_names_must_differ(tmp_path, names):
    with pytest.raises(ValueError, match="one or more different names"):
        load_domains(names, tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "."])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match="must be the name of a folder"):
        load_domain(name, tmp_path)


def test_an_unknown_name_lists_the_published_ones(tmp_path):
    train, test = missing("caltech", tmp_path)
    assert train.path == tmp_path / "caltech" / "train"
    assert test.path == tmp_path / "caltech" / "test"
    assert "published datasets are aircraft, caltech101, dtd," in train.origin


def test_the_split_file_of_another_dataset_shows_in_the_classes(tmp_path):
    pets, food = write_coop(tmp_path, "oxford_pets"), write_coop(tmp_path, "food101")
    food.write_bytes(pets.read_bytes())
    with pytest.raises(ValueError) as error:
        load_domain("food101", tmp_path)
    assert str(error.value) == (
        f"{food} has 37 classes, labels 0 to 36; expected 101, labels 0 to 100. "
        "Is it the file of another dataset (oxford_pets)?"
    )


def test_a_split_file_for_other_images_shows_in_the_paths(tmp_path):
    file = write_coop(tmp_path, "dtd", train=2)
    (tmp_path / "dtd" / "images").rename(tmp_path / "dtd" / "old")
    (tmp_path / "dtd" / "images").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load_domain("dtd", tmp_path)
    message = str(error.value)
    assert message.startswith(f"141 of 141 images that {file} lists do not exist, the first ")
    assert "Is it the file of another dataset" in message


@pytest.mark.parametrize("name", ["dtd", "aircraft"])
def test_a_missing_image_is_named_and_counted(tmp_path, name):
    write_tree(tmp_path, [name])
    first = load_domain(name, tmp_path).train.paths[0]
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of .* do not exist, the first {first}"):
        load_domain(name, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _: "{", "is not JSON"),
        (lambda _: "[]", 'must have a non-empty list "train"'),
        (lambda rows: {**rows, "test": []}, 'must have a non-empty list "test"'),
        (
            lambda rows: {**rows, "train": [["a.jpg", "0", "cat"]]},
            r"must be \[path, label, class\]",
        ),
        (
            lambda rows: {**rows, "train": [*rows["train"], ["a.jpg", 0, "other"]]},
            "calls label 0 both",
        ),
        (
            lambda rows: {**rows, "test": [["a.jpg", 1, "banded"]]},
            "test image a.jpg has class 1 'banded', and train has 1 'blotchy'",
        ),
        (
            lambda rows: {**rows, "train": [[p, y + 1, text] for p, y, text in rows["train"]]},
            "47 classes, labels 1 to 47; expected 47, labels 0 to 46",
        ),
    ],
    ids=["no-json", "list", "no-test", "text-label", "two-names", "test-differs", "from-one"],
)
def test_a_damaged_split_file(tmp_path, change, message):
    file = write_coop(tmp_path, "dtd")
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        load_domain("dtd", tmp_path)


def test_half_a_surrogate_pair_in_a_class_name_is_named(tmp_path):
    file = write_coop(tmp_path, "dtd")
    file.write_text(file.read_text().replace("blotchy", "blotch\\ud800"))
    message = (
        "dtd: the name of class 1 must hold whole characters, got '\\ud800' in place 6: half of "
        "a surrogate pair"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_domain("dtd", tmp_path)
    # A folder's name in bytes that are not UTF-8.
    write_folders(tmp_path, "birds", ["auk", "emu\udcff"])
    with pytest.raises(ValueError, match="birds: the name of class 1 must hold whole characters"):
        load_domain("birds", tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("variants.txt", b"747\n", "has 1 classes"),
        ("variants.txt", b"", "is empty"),
        ("variants.txt", b"\xff\xfe", "is not text"),
        ("images_variant_test.txt", b"te0 Zeppelin\n", "'te0 Zeppelin' must be an image and one"),
    ],
    ids=["other-list", "empty", "binary", "unknown-variant"],
)
def test_a_damaged_aircraft_list(tmp_path, file, content, message):
    write_tree(tmp_path, ["aircraft"])
    (tmp_path / "fgvc_aircraft" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_domain("aircraft", tmp_path)


@pytest.mark.parametrize("length", [0, 10, 5000], ids=["empty", "header-cut", "data-cut"])
def test_a_damaged_mnist_file(tmp_path, length):
    write_tree(tmp_path, ["mnist"])
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a file in .*MNIST/raw is damaged \("):
        load_domain("mnist", tmp_path)


@pytest.mark.parametrize("text", ["a photo", "{} or {}", "a {x} {}", "a {}\nthe {}", ""])
def test_a_template_has_one_place_for_the_class(tmp_path, text):
    write_folders(tmp_path, "birds", ["auk"], template=text)
    with pytest.raises(ValueError, match=r"template\.txt (must be one line with one {}|is empty)"):
        load_domain("birds", tmp_path)


def test_a_folder_of_ones_own_that_does_not_fit(tmp_path):
    write_folders(tmp_path, "a", ["auk"])
    (tmp_path / "a" / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match="has classes that train lacks: emu"):
        load_domain("a", tmp_path)
    write_folders(tmp_path, "b", ["great_auk", "great auk"])
    with pytest.raises(ValueError, match=r"two folders in .* mean 'great auk'"):
        load_domain("b", tmp_path)
    write_folders(tmp_path, "c", ["auk"], test=0)
    with pytest.raises(ValueError, match="c/test has no image"):
        load_domain("c", tmp_path)
    write_folders(tmp_path, "d", [])
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "test").mkdir()
    with pytest.raises(ValueError, match="must hold a folder for each class"):
        load_domain("d", tmp_path)


# Two datasets that share a class name


def test_shared_class_names_keep_their_labels_and_are_reported(tmp_path):
    write_folders(tmp_path, "birds", ["auk", "emu"])
    write_folders(tmp_path, "zoo", ["bear", "emu"])
    write_folders(tmp_path, "toys", ["emu"], template="a toy {}.")
    found = load_domains(["birds", "zoo", "toys"], tmp_path)
    assert offsets(found) == [0, 2, 4]
    # The name is shared by three, the prompt by two.
    assert shared_names(found) == [("a photo of a emu.", "birds", "zoo")]
