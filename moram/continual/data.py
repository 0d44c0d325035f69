"""Tasks on disk and in memory. No tokens and no training here."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Example(NamedTuple):
    """One question and its answer, as text."""

    prompt: str
    answer: str


class Task(NamedTuple):
    """One element of a stream."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def load_stream(
    directory: str | Path,
    names: Iterable[str],
    train_split: Mapping[str, str] | None = None,
    test_split: str | None = "test",
) -> list[Task]:
    """Read tasks in TRACE's format, in order.

    Args:
        directory: holds NAME/train.json and NAME/test.json, each a JSON list of
            {"prompt": str, "answer": str}.
        names: the tasks, in the order they are learned.
        train_split: dict from task to the file it is trained on, where that is not "train".
        test_split: the file that is scored: "test" or "eval"; None = the one trained on.
    Returns:
        A list of `Task`.
    Raises:
        FileNotFoundError, ValueError: a task is missing, repeated or not of this format; the
            message names the file, and the entry where it is one.
    """
    directory, names = Path(directory), list(names)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be one or more different names, got {names}")
    present = sorted({path.parent.name for path in directory.glob("*/*.json")})
    splits = {name: (train_split or {}).get(name, "train") for name in names}
    for name, split in splits.items():
        if not (directory / name / f"{split}.json").is_file():
            others = sorted(path.stem for path in (directory / name).glob("*.json"))
            raise FileNotFoundError(
                f"{directory} has no task {name!r} (no {name}/{split}.json); "
                + (
                    f"the task has: {', '.join(others)}"
                    if others
                    else f"it has: {', '.join(present) or 'none'}"
                )
            )
    return [
        Task(
            name,
            _read(directory / name / f"{split}.json"),
            _read(directory / name / f"{test_split or split}.json"),
        )
        for name, split in splits.items()
    ]


def _read(path: Path) -> tuple[Example, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    rows = read_json_text(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a non-empty list, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        texts = [row.get(name) for name in Example._fields] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f'{path}: entry {i} must be {{"prompt": text, "answer": text}}, got {row!r:.80}'
            )
        for name in Example._fields:
            check_characters(f"{path}: the {name} of entry {i}", row[name])
    return tuple(Example(row["prompt"], row["answer"]) for row in rows)


def read_json_text(path: str | Path) -> Any:
    """The value in a JSON file; a byte-order mark before it, as Windows writes one, is no part.

    Raises:
        ValueError: it is not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def check_characters(name: str, text: str) -> None:
    """Refuse a text that no tokenizer takes: JSON can write half of a surrogate pair.

    Raises:
        ValueError: it holds one; the message begins with name.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must hold whole characters, got {text[error.start]!r} in place "
            f"{error.start}: half of a surrogate pair"
        ) from error
