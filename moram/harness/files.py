"""What a run writes, so that no file is ever half there: a new file takes the place of the old."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

# What a run's results.json holds.
Results = dict[str, Any]


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one step: a crash or a full disk leaves the old one, or none."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """`write_text` of bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file, or None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """`write_text` of nested dicts of tensors."""
    _replace(Path(path), lambda file: torch.save(state, file))


def read_state(path: str | Path) -> dict[str, Any] | None:
    """What `write_state` wrote, on the CPU, or None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        return None
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged: torch writes archives, and it is none")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_space(folder: str | Path, needed: float) -> None:
    """Raise OSError unless the disk has room for that many bytes, before hours of work."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, and this run writes up to "
            f"{needed / 2**20:.0f} MiB"
        )


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
