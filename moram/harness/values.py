"""What the values of settings may be: by the annotation of a setting, and by its rules."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeAlias, get_args, get_origin

from ..config import check_count
from ..models.presets import PRESETS as TARGETS

# What a number may be: in words, and as a test that refuses NaN.
Within: TypeAlias = tuple[str, Callable[[Any], bool]]
FRACTION: Within = ("in [0, 1)", lambda value: 0 <= value < 1)
POSITIVE: Within = ("finite and > 0", lambda value: 0 < value < float("inf"))
NOT_NEGATIVE: Within = (">= 0", lambda value: value >= 0)


def setting(default: Any, **rules: Any) -> Any:
    """A setting's default and rules; where a subclass declares it again, the rules stay.

    Args:
        default: its value where none is given.
        rules: least: of a whole number, 1 unless given. within: FRACTION, POSITIVE or NOT_NEGATIVE.
            among: the values it may have. given: true = it may not be empty. free: true = it
            changes no result, up to rounding. same_row: true = tables put runs that differ in it
            into one row.
    """
    return field(default=default, metadata=rules)


def rules_of(kind: type, name: str) -> dict[str, Any]:
    """The rules of a dataclass's setting, from the class that declared it first to the last."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        item = base.__dict__.get("__dataclass_fields__", {}).get(name)
        found |= item.metadata if item is not None else {}
    return found


def default_of(item: Field[Any]) -> Any:
    """The value of a setting where none is given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def converted(item: Field[Any], value: Any) -> Any:
    """A value as its setting keeps it: names as tuples, paths as text."""
    if item.name == "targets":
        named = isinstance(value, str) and (value == "auto" or value in TARGETS)
        return value if named else _names(item.name, value)
    if item.name == "betas":
        return _betas(value)
    if _kinds(item) == {tuple}:
        return _names(item.name, value)
    return str(value) if isinstance(value, Path) and str in _kinds(item) else value


def check_value(settings: Any, item: Field[Any], task: str | None = None) -> None:
    """Raise unless a setting's value is of its kind and within its rules.

    Args:
        settings: a dataclass whose values are `converted`. item: one of its fields.
        task: a task, where the value is a dict by task; None = check what it is for all.
    """
    name, value, kinds = item.name, getattr(settings, item.name), _kinds(item)
    if isinstance(value, dict) and dict in kinds:
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"the keys of {name} must be text, got {value!r}")
        if task is None or kinds == {dict}:
            return
        name, value = f"{name} of {task}", settings.of(name, task)
    elif kinds == {dict}:
        raise TypeError(f"{name} must be a mapping, got {value!r}")
    if value is None and NoneType in kinds:
        return
    rules = rules_of(type(settings), item.name)
    for kind, check in _CHECKS.items():
        # Names and pairs were checked as they were converted.
        if kind in kinds and tuple not in kinds:
            check(name, value, rules)
    if rules.get("given") and not value:
        raise ValueError(f"{name} must be given")


def among(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise unless value is one of those allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _kinds(item: Field[Any]) -> set[object]:
    parts = get_args(item.type) if isinstance(item.type, UnionType) else (item.type,)
    return {get_origin(part) or part for part in parts}


def _names(name: str, value: Any) -> tuple[str, ...]:
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name} must be a list of names, got {value!r}")
    return tuple(v.strip() for v in value if v.strip())


def _betas(value: Any) -> tuple[float, ...]:
    betas = value.split(",") if isinstance(value, str) else value
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be two numbers in [0, 1), got {value!r}")
    found = []
    for beta in betas:
        try:
            found.append(float(beta) if isinstance(beta, str) else beta)
        except ValueError as error:
            raise TypeError(f"betas must be a number, got {beta!r}") from error
        _check_number("betas", found[-1], {})
    return tuple(found)


def _check_text(name: str, value: Any, rules: dict[str, Any]) -> None:
    if "among" in rules:
        among(name, value, rules["among"])
    elif not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")


def _check_flag(name: str, value: Any, rules: dict[str, Any]) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def _check_number(name: str, value: Any, rules: dict[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    words, fits = rules.get("within", ("", lambda value: True))
    if not fits(value):
        raise ValueError(f"{name} must be {words}, got {value}")


def _check_whole(name: str, value: Any, rules: dict[str, Any]) -> None:
    check_count(name, value, rules.get("least", 1))


_CHECKS: dict[type, Callable[[str, Any, dict[str, Any]], None]] = {
    str: _check_text,
    bool: _check_flag,
    float: _check_number,
    int: _check_whole,
}
