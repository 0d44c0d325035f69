"""Folders of one's own images as a `Domain`, and what of them is passed over."""

from collections import Counter
from pathlib import Path

from PIL import Image, ImageFile

from .catalog import DEFAULT_TEMPLATE
from .domains import Domain, FileSplit

TEMPLATE = "template.txt"
# What Windows leaves in folders; macOS and Linux hide theirs behind a point.
_LITTER = ("thumbs.db", "desktop.ini")
# Of what is passed over, so many are named.
_NAMED = 5


def read_folders(name: str, root: Path) -> Domain:
    """NAME/{train,test}/CLASS/IMAGE, a class for each folder in train, sorted by name."""
    folder = root / name
    names = [path.name for path in _entries(folder / "train") if path.is_dir()]
    if not names:
        raise ValueError(f"{folder / 'train'} must hold a folder for each class")
    classes = tuple(text.replace("_", " ") for text in names)
    twice = [text for text, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(f"two folders in {folder / 'train'} mean {twice[0]!r}")
    unknown = {path.name for path in _entries(folder / "test") if path.is_dir()} - set(names)
    if unknown:
        raise ValueError(
            f"{folder / 'test'} has classes that train lacks: {', '.join(sorted(unknown))}"
        )
    known, endings = ("train", "test", TEMPLATE), _image_endings()
    splits, left = [], [path for path in _entries(folder) if path.name not in known]
    for split in ("train", "test"):
        left += [path for path in _entries(folder / split) if not path.is_dir()]
        found = []
        for label, text in enumerate(names):
            for path in _entries(folder / split / text):
                if path.is_file() and path.suffix.lower() in endings:
                    found.append((path, label))
                else:
                    left.append(path)
        if not found:
            raise ValueError(f"{folder / split} has no image with an ending that Pillow reads")
        splits.append(FileSplit(*zip(*found, strict=True)))
    train, test = splits
    shown = (path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in left)
    return Domain(name, classes, _template(folder / TEMPLATE), train, test, tuple(sorted(shown)))


def describe_passed_over(domain: Domain) -> str:
    """A line about the files and folders of a domain that are not read, empty if there are none."""
    left = domain.passed_over
    if not left:
        return ""
    named = ", ".join([*left[:_NAMED], *["..."] * (len(left) > _NAMED)])
    return (
        f"{len(left)} files or folders of {domain.name} are passed over: {named}; images are read "
        "from {train,test}/CLASS/, with an ending that Pillow reads"
    )


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without space around them; blank ones are left out.

    Raises:
        ValueError: it is empty or no text.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name, but for hidden files; nothing if there is none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if not p.name.startswith(".") and p.name.lower() not in _LITTER]


def _image_endings() -> set[str]:
    """Endings of the files that the installed Pillow decodes."""
    Image.init()
    # Of stubs and of video Pillow reads the header alone.
    factories = {kind: factory for kind, (factory, _) in Image.OPEN.items() if kind != "MPEG"}
    stubs = {
        kind
        for kind, factory in factories.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    known = factories.keys() - stubs
    return {end for end, kind in Image.registered_extensions().items() if kind in known}


def _template(file: Path) -> str:
    if not file.is_file():
        return DEFAULT_TEMPLATE
    lines = read_lines(file)
    if len(lines) != 1 or lines[0].count("{}") != 1 or set("{}") & set(lines[0].replace("{}", "")):
        raise ValueError(f"{file} must be one line with one {{}}, got {lines}")
    return lines[0]
