"""The published datasets of X-TAIL and MTIL: facts alone. Reading them is in datasets.py.

And the names of those of the preset `small`, which are made or read in small.py.

Names, order, templates and folders are those of the MoRAM, CoDyRA and RAIL repositories; folders,
split files and origins those of CoOp's DATASETS.md. Numbers of images are from CoOp's paper and the
datasets' pages and were not counted here: a difference is a note, a wrong number of classes an
error.
"""

from typing import NamedTuple


class Facts(NamedTuple):
    """One dataset.

    num_classes: int.
    template: prompt with one `{}`.
    layouts: (folder, where images lie in it) under the root, the recommended one first; None where
        the files are the images.
    files: split files or arrays that must lie in the folder.
    num_train, num_test: images expected in the official split.
    images_origin, files_origin: where they came from.
    suffix: what is appended to every class name.
    """

    num_classes: int
    template: str
    layouts: tuple[tuple[str, str | None], ...]
    files: tuple[str, ...]
    num_train: int
    num_test: int
    images_origin: str
    files_origin: str
    suffix: str = ""


# The order in which they are learned.
XTAIL = (
    "aircraft",
    "caltech101",
    "dtd",
    "eurosat",
    "oxford_flowers",
    "food101",
    "mnist",
    "oxford_pets",
    "stanford_cars",
    "sun397",
)
MTIL = (*XTAIL[:2], "cifar100", *XTAIL[2:])
# Many classes first, as in X-TAIL: they are what the text loss is divided by.
SMALL = ("symbols", "letters", "digits", "greek", "shapes", "textures")
REAL = ("mnist10k", "animals", "vehicles")
DEFAULT_TEMPLATE = "a photo of a {}."

_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_AIRCRAFT = f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/ (or torchvision.datasets.MNIST)"
_CIFAR100 = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"


def _drive(file_id: str) -> str:
    return f"https://drive.google.com/file/d/{file_id}/view (CoOp's DATASETS.md)"


FACTS = {
    "aircraft": Facts(
        100,
        "a photo of a {}, a type of aircraft.",
        (("fgvc_aircraft", "images"), ("fgvc-aircraft-2013b/data", "images")),
        ("variants.txt", "images_variant_train.txt", "images_variant_test.txt"),
        3334,
        3333,
        _AIRCRAFT,
        _AIRCRAFT,
    ),
    "caltech101": Facts(
        100,
        DEFAULT_TEMPLATE,
        (("caltech-101", "101_ObjectCategories"), ("caltech101", "101_ObjectCategories")),
        ("split_zhou_Caltech101.json",),
        4128,
        2465,
        "http://www.vision.caltech.edu/Image_Datasets/Caltech101/101_ObjectCategories.tar.gz",
        _drive("1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
    ),
    "dtd": Facts(
        47,
        "{} texture.",
        (("dtd", "images"), ("dtd/dtd", "images")),
        ("split_zhou_DescribableTextures.json",),
        2820,
        1692,
        f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz",
        _drive("1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
    ),
    "eurosat": Facts(
        10,
        "a centered satellite photo of the {}.",
        (("eurosat", "2750"),),
        ("split_zhou_EuroSAT.json",),
        13500,
        8100,
        "http://madm.dfki.de/files/sentinel/EuroSAT.zip",
        _drive("1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
        " satellite location",
    ),
    "oxford_flowers": Facts(
        102,
        "a photo of a {}, a type of flower.",
        (("oxford_flowers", "jpg"), ("flowers-102", "jpg")),
        ("split_zhou_OxfordFlowers.json",),
        4093,
        2463,
        f"{_VGG}/flowers/102/102flowers.tgz",
        _drive("1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
    ),
    "food101": Facts(
        101,
        "a photo of a {}, a type of food.",
        (("food-101", "images"),),
        ("split_zhou_Food101.json",),
        50500,
        30300,
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        _drive("1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
    ),
    "mnist": Facts(
        10,
        'a photo of the number: "{}".',
        (("MNIST/raw", None), ("mnist/MNIST/raw", None)),
        (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        60000,
        10000,
        _MNIST,
        _MNIST,
    ),
    "oxford_pets": Facts(
        37,
        "a photo of a {}, a type of pet.",
        (("oxford_pets", "images"), ("oxford-iiit-pet", "images")),
        ("split_zhou_OxfordPets.json",),
        2944,
        3669,
        f"{_VGG}/pets/data/images.tar.gz",
        _drive("1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
    ),
    "stanford_cars": Facts(
        196,
        DEFAULT_TEMPLATE,
        (("stanford_cars", ""),),
        ("split_zhou_StanfordCars.json",),
        6509,
        8041,
        "http://ai.stanford.edu/~jkrause/car196/ (cars_train.tgz, cars_test.tgz)",
        _drive("1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    ),
    "sun397": Facts(
        397,
        DEFAULT_TEMPLATE,
        (("sun397", "SUN397"), ("SUN397", "")),
        ("split_zhou_SUN397.json",),
        15880,
        19850,
        "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
        _drive("1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"),
    ),
    "cifar100": Facts(
        100,
        DEFAULT_TEMPLATE,
        (("cifar-100-python", None), ("cifar100/cifar-100-python", None)),
        ("train", "test", "meta"),
        50000,
        10000,
        _CIFAR100,
        _CIFAR100,
    ),
}
