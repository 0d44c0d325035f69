"""What of the datasets is on disk, for `moram xtail check-data`. Reads alone, downloads nothing."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .catalog import FACTS, XTAIL
from .datasets import load_domain, missing, shared_names
from .domains import Domain, check_covered, check_images
from .folders import describe_passed_over
from .small import is_small, load_small


def check_data(
    root: str | Path,
    names: Iterable[str] | None = None,
    images: bool = False,
    log: Callable[[str], object] = print,
) -> int:
    """Say of each dataset whether it is complete, and what is missing where.

    Folders, split files, the number of classes, that every listed image exists and that each class
    has training and test images are checked. A number of images other than that of the official
    split is a note and no problem, as are files that are passed over and a prompt that two classes
    share.

    Args:
        root: folder of all datasets; need not exist.
        names: datasets, see `datasets.load_domain`, or those of `small`; None = the ten of X-TAIL.
        images: if true, each image of train and test is decoded too.
        log: called with each line.
    Returns:
        The number of problems.
    """
    names = list(dict.fromkeys(XTAIL if names is None else names))
    problems, complete, domains = 0, 0, []
    for name in names:
        domain, found = _check(name, root, images)
        state = "OK" if not found else f"{len(found)} problem{'s' * (len(found) > 1)}"
        size = f", {_size(domain)}" if domain else ""
        log(f"{name}: {state}{size}")
        for line in found:
            log(f"  {line}")
        if domain:
            domains.append(domain)
            for line in _notes(domain):
                log(f"  note: {line}")
        problems, complete = problems + len(found), complete + (not found)
    for prompt, first, second in shared_names(domains):
        log(f'note: "{prompt}" is a prompt of both {first} and {second}; ties go to the earlier')
    log(f"{complete} of {len(names)} datasets are complete in {root}")
    return problems


def _check(name: str, root: str | Path, images: bool) -> tuple[Domain | None, list[str]]:
    """The dataset, or None if it cannot be read; a line for each problem."""
    try:
        if is_small(name):
            domain = load_small(name, root)
            check_covered(domain)
            return domain, []
        absent = missing(name, root)
        if absent:
            return None, [f"missing: {path}, from {origin}" for path, origin in absent]
        domain = load_domain(name, root)
    except (OSError, ValueError) as error:
        return None, [str(error)]
    bad = check_images(domain.train) + check_images(domain.test) if images else []
    return domain, [f"bad image: {path}: {reason}" for path, reason in bad]


def _size(domain: Domain) -> str:
    counts = f"{len(domain.train)} train and {len(domain.test)} test images"
    return f"{len(domain.classes)} classes, {counts}"


def _notes(domain: Domain) -> Iterator[str]:
    facts = FACTS.get(domain.name)
    if facts:
        pairs = (("train", domain.train, facts.num_train), ("test", domain.test, facts.num_test))
        for split, images, expected in pairs:
            if len(images) != expected:
                yield f"{len(images)} {split} images, expected {expected}"
    if domain.passed_over:
        yield describe_passed_over(domain)
