"""Datasets on disk as `Domain`s. Downloads nothing. Folders of one's own are read in folders.py.

Class names are those of the published protocol: as the split file or list has them (underscores
stay), EuroSAT's with " satellite location" appended, MNIST's worded as a number (its template says
so again), CIFAR-100's and those of folders with spaces for underscores.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ...continual.data import check_characters, read_json_text
from .catalog import FACTS
from .domains import ArraySplit, Domain, FileSplit, check_covered
from .folders import read_folders, read_lines


class Missing(NamedTuple):
    """Something that is not on disk: where it belongs, and where it comes from."""

    path: Path
    origin: str


def load_domain(name: str, root: str | Path, spaces: bool = False) -> Domain:
    """Read one dataset.

    Args:
        name: one of `catalog.FACTS`, or a folder with {train,test}/CLASS/IMAGE and, if the prompt
            is not to be "a photo of a {}.", template.txt.
        root: folder of all datasets.
        spaces: if true, underscores in class names become spaces in every dataset, as in RAIL.
    Returns:
        A `Domain`. Every image that is listed exists; none was decoded. Each class has images in
        both splits.
    Raises:
        FileNotFoundError: a folder, split file or listed image is missing; says where it belongs
            (`missing` also says where it comes from).
        ValueError: a file is damaged, of another dataset or not of the expected format; a class
            has no image to learn from, or none to be scored on.
    """
    root = Path(root)
    absent = missing(name, root)
    if absent:
        raise FileNotFoundError("missing: " + ", ".join(str(path) for path, _ in absent))
    read = _READERS.get(name, _read_coop) if name in FACTS else read_folders
    domain = read(name, root)
    for label, text in enumerate(domain.classes):
        check_characters(f"{name}: the name of class {label}", text)
    check_covered(domain)
    if spaces:
        domain = domain._replace(classes=tuple(text.replace("_", " ") for text in domain.classes))
    return domain


def load_domains(names: Iterable[str], root: str | Path, spaces: bool = False) -> list[Domain]:
    """Read the datasets of a stream, in order.

    Args:
        names: different names, see `load_domain`.
        root, spaces: see `load_domain`.
    Raises:
        FileNotFoundError, ValueError: names repeat, or datasets cannot be read: the message has
            all of them. FileNotFoundError if something is only missing, of all that is wrong.
    """
    names, errors, domains = list(names), {}, []
    if not names or len(set(names)) != len(names):
        raise ValueError(f"datasets must be one or more different names, got {names}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder; it must hold the datasets")
    for name in names:
        try:
            domains.append(load_domain(name, root, spaces))
        except (OSError, ValueError) as error:
            errors[name] = error
    if errors:
        is_missing = all(isinstance(error, FileNotFoundError) for error in errors.values())
        raise (FileNotFoundError if is_missing else ValueError)(
            f"{len(errors)} of {len(names)} datasets cannot be read: "
            + " | ".join(f"{name}: {error}" for name, error in errors.items())
            + f" | `moram xtail check-data {root}` says where each comes from"
        )
    return domains


def offsets(domains: Iterable[Domain]) -> list[int]:
    """The label of each dataset's first class in the joint label space of all of them."""
    return [0, *accumulate(len(domain.classes) for domain in domains)][:-1]


def shared_names(domains: Iterable[Domain]) -> list[tuple[str, str, str]]:
    """Prompts that more than one class has.

    Two classes of one name keep their two labels. If their templates are the same too, no model can
    tell them apart by text: ties go to the earlier one, as with argmax in the published code.

    Returns:
        [(prompt, the earlier dataset's name, the later one's)]; once a dataset if both are in one.
    """
    owner: dict[str, str] = {}
    shared = []
    for domain in domains:
        for prompt in domain.prompts:
            if prompt in owner:
                shared.append((prompt, owner[prompt], domain.name))
            owner.setdefault(prompt, domain.name)
    return shared


def missing(name: str, root: str | Path) -> list[Missing]:
    """What a dataset lacks of folders and split files, empty if it is complete.

    Images that a split file lists are not looked for: `load_domain` does that.

    Raises:
        ValueError: the name is a path.
    """
    if Path(name).name in ("", "..") or Path(name).name != name:
        raise ValueError(f"a dataset's name must be the name of a folder, got {name!r}")
    if name not in FACTS:
        origin = (
            f"your own images, as {name}/{{train,test}}/CLASS/*.jpg; "
            f"the published datasets are {', '.join(FACTS)}"
        )
        folders = [Path(root) / name / split for split in ("train", "test")]
        return [Missing(folder, origin) for folder in folders if not folder.is_dir()]
    facts = FACTS[name]
    folder, images = _layout(name, root)
    absent = []
    if images is not None and not images.is_dir():
        absent.append(Missing(images, facts.images_origin))
    absent += [
        Missing(folder / file, facts.files_origin)
        for file in facts.files
        if not (folder / file).is_file()
    ]
    return absent


def _layout(name: str, root: str | Path) -> tuple[Path, Path | None]:
    """The folder of a published dataset and that of its images: the most complete layout."""

    def places(layout: tuple[str, str | None]) -> tuple[Path, Path | None]:
        folder, images = layout
        return Path(root) / folder, None if images is None else Path(root) / folder / images

    def found(layout: tuple[str, str | None]) -> int:
        folder, images = places(layout)
        return (folder if images is None else images).is_dir() + all(
            (folder / file).is_file() for file in FACTS[name].files
        )

    # The first of equals is the recommended one.
    return places(max(FACTS[name].layouts, key=found))


def _read_coop(name: str, root: Path) -> Domain:
    """CoOp's split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    folder, images = _layout(name, root)
    assert images is not None
    file = folder / FACTS[name].files[0]
    content = read_json_text(file)
    rows = {split: _coop_rows(file, content, split) for split in ("train", "test")}
    texts = {}
    for _, label, text in rows["train"]:
        if texts.setdefault(label, text) != text:
            raise ValueError(f"{file} calls label {label} both {texts[label]!r}, {text!r}")
    _check_classes(name, file, texts)
    for path, label, text in rows["test"]:
        if texts.get(label) != text:
            raise ValueError(
                f"{file}: test image {path} has class {label} {text!r}, and train has "
                f"{label} {texts.get(label)!r}"
            )
    classes = tuple(texts[label] + FACTS[name].suffix for label in sorted(texts))
    train, test = (
        FileSplit(
            [images / path for path, *_ in rows[split]], [label for _, label, _ in rows[split]]
        )
        for split in ("train", "test")
    )
    _check_listed(name, file, images, (train, test))
    return Domain(name, classes, FACTS[name].template, train, test)


def _coop_rows(file: Path, content: Any, split: str) -> list[Any]:
    rows = content.get(split) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{file} must have a non-empty list "{split}" of [path, label, class]')
    for row in rows:
        if not isinstance(row, list) or [type(part) for part in row] != [str, int, str]:
            raise ValueError(f"{file}: each {split} entry must be [path, label, class], got {row}")
    return rows


def _check_classes(name: str, file: Path, labels: Collection[int]) -> None:
    wanted = FACTS[name].num_classes
    if sorted(labels) == list(range(wanted)):
        return
    alike = [key for key, facts in FACTS.items() if facts.num_classes == len(labels)]
    raise ValueError(
        f"{file} has {len(labels)} classes, labels {min(labels)} to {max(labels)}; "
        f"expected {wanted}, labels 0 to {wanted - 1}. Is it the file of another dataset"
        + (f" ({' or '.join(alike)})?" if alike and name not in alike else "?")
    )


def _check_listed(name: str, file: Path, images: Path, splits: Sequence[FileSplit]) -> None:
    """Every listed image exists: one listing per folder, as a network is slow to ask."""
    paths = [path for split in splits for path in split.paths]
    listings = {folder: _listing(folder) for folder in {os.path.dirname(path) for path in paths}}
    absent = [
        path
        for path in paths
        # A file system that ignores case has files that no listing spells like that.
        if os.path.basename(path) not in listings[os.path.dirname(path)]
        and not os.path.isfile(path)
    ]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of {len(paths)} images that {file} lists do not exist, the "
            f"first {absent[0]} (from {FACTS[name].images_origin})"
            + (
                f". Is it the file of another dataset, or is {images} not the images' folder?"
                if len(absent) == len(paths)
                else ""
            )
        )


def _listing(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _read_aircraft(name: str, root: Path) -> Domain:
    """Variants as classes; the official train list alone is trained on, as published."""
    folder, images = _layout(name, root)
    assert images is not None
    variants, *lists = (folder / file for file in FACTS[name].files)
    classes = tuple(read_lines(variants))
    label_of = {text: label for label, text in enumerate(classes)}
    _check_classes(name, variants, set(label_of.values()))
    splits = []
    for file in lists:
        paths, labels = [], []
        for line in read_lines(file):
            image, _, variant = line.partition(" ")
            if variant not in label_of:
                raise ValueError(f"{file}: {line!r} must be an image and one of {variants}")
            paths.append(images / f"{image}.jpg")
            labels.append(label_of[variant])
        splits.append(FileSplit(paths, labels))
        _check_listed(name, file, images, splits[-1:])
    train, test = splits
    return Domain(name, classes, FACTS[name].template, train, test)


def _read_mnist(name: str, root: Path) -> Domain:
    from torchvision.datasets import MNIST

    folder, _ = _layout(name, root)
    classes = [f'number: "{text}"' for text in MNIST.classes]
    # torchvision appends MNIST/raw itself.
    return _read_arrays(name, MNIST, folder, folder.parent.parent, classes)


def _read_cifar100(name: str, root: Path) -> Domain:
    from torchvision.datasets import CIFAR100

    folder, _ = _layout(name, root)
    return _read_arrays(name, CIFAR100, folder, folder.parent)


def _read_arrays(
    name: str,
    dataset: Callable[..., Any],
    folder: Path,
    root: Path,
    classes: Sequence[str] | None = None,
) -> Domain:
    try:
        parts = [dataset(root, train=train, download=False) for train in (True, False)]
        train, test = (
            ArraySplit(part.data, part.targets, f"{folder}/{split}")
            for split, part in zip(("train", "test"), parts, strict=True)
        )
    # What torchvision raises for damaged files: it asserts, and its checksums are RuntimeErrors.
    except (RuntimeError, ValueError, AssertionError, EOFError, LookupError, TypeError) as error:
        raise ValueError(
            f"a file in {folder} is damaged ({str(error) or type(error).__name__}); get it anew "
            f"from {FACTS[name].files_origin}"
        ) from error
    for split in (train, test):
        _check_classes(name, folder, set(split.labels))
    classes = tuple(text.replace("_", " ") for text in classes or parts[0].classes)
    return Domain(name, classes, FACTS[name].template, train, test)


_READERS = {"aircraft": _read_aircraft, "mnist": _read_mnist, "cifar100": _read_cifar100}
