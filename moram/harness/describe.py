"""Settings in words: defaults, what a preset says, and what the docstrings say of each."""

import copy
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

# By name: settings for all methods, under "*", and for single ones.
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Meaning(NamedTuple):
    """What a docstring says of a field. name: as it is written there, such as "epochs*"."""

    name: str
    text: str


def describe(
    kind: type,
    presets: Presets,
    preset: str,
    method: str,
    *,
    related: Iterable[type] = (),
    width: int = 100,
) -> str:
    """Every setting with its default, what a preset sets it to, and its meaning.

    Args:
        kind: the dataclass of the settings. presets: by name, see `moram.trace.presets`.
        preset, method: whose settings to show beside the defaults.
        related: see `meanings`.
        width: of a line, in characters.
    Returns:
        Text. Values are JSON, which YAML files and --set take as they are.
    Raises:
        ValueError: there is no such preset.
    """
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}")
    words = meanings(kind, related)
    values = preset_values(presets, preset, method)
    lines = [textwrap.fill(text, width) for text in _introduction(kind)]
    for item in fields(kind):
        meaning = words.get(item.name, Meaning(item.name, ""))
        lines.append(f"\n{meaning.name} = {_json(_default(item))}")
        if item.name in values and values[item.name] != _default(item):
            lines += _indented(f"in {preset}: {_json(values[item.name])}", width)
        lines += _indented(meaning.text, width)
    return "\n".join(lines)


def preset_values(presets: Presets, preset: str, method: str) -> dict[str, Any]:
    """What a preset sets for a method; the dict and all in it belong to the caller."""
    start = copy.deepcopy(presets[preset])
    return {"preset": preset, "method": method, **start["*"], **start.get(method, {})}


def meanings(kind: type, related: Iterable[type] = ()) -> dict[str, Meaning]:
    """What each field of a dataclass means, from the Args of its docstring and of its bases'.

    An entry may begin with several names ("suite, order: ..."), each with or without a mark
    ("epochs*"), and so may a sentence inside it ("... at most. labels: how ...").

    Args:
        kind: the dataclass.
        related: dataclasses that say of fields of the same names what "see `Name`" or "as in
            `Name`" refers to, which these words then stand for.
    Returns:
        Dict from field to `Meaning`; a field that no docstring names is not in it.
    """
    name = rf"(?:{'|'.join(item.name for item in fields(kind))})\*?"
    head = re.compile(rf"(?:^|(?<=\. ))({name}(?:, {name})*): ")
    found: dict[str, Meaning] = {}
    # A class says more of a field than its bases.
    for base in reversed(kind.__mro__):
        for entry in _entries(base.__dict__.get("__doc__")):
            _, *parts = head.split(entry)
            for names, text in zip(parts[::2], parts[1::2], strict=True):
                for written in names.split(", "):
                    found[written.rstrip("*")] = Meaning(written, text.strip())
    for other in related:
        reference = re.compile(rf"(?:see|as in) `{other.__name__}`")
        for field, known in meanings(other).items():
            if field in found:
                text = known.text.removesuffix(".")
                text = reference.sub(lambda _, text=text: text, found[field].text)
                found[field] = found[field]._replace(text=text)
    return found


def _entries(doc: str | None) -> list[str]:
    """The entries below "Args:" in a docstring, each as one line."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", inspect.cleandoc(doc or "") + "\n", re.M)
    blocks = re.split(r"^ {4}(?! )", section[1], flags=re.M) if section else []
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _introduction(kind: type) -> list[str]:
    """The paragraphs of a docstring between its first line and its sections, each as one line."""
    head = re.split(r"^\w[\w, ]*:\n", inspect.cleandoc(kind.__doc__ or ""), flags=re.M)[0]
    return [" ".join(text.split()) for text in head.split("\n\n")[1:] if text.strip()]


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _indented(text: str, width: int) -> list[str]:
    indent = " " * 4
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
