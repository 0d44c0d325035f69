"""Settings as text: a YAML file, or key=value. What the values mean is `settings`' business."""

import re
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path} must hold a mapping from setting to value")
    return _to_number(found)


def parse_change(text: str) -> tuple[str, Any]:
    """("key", value) of "key=value", the value read as YAML.

    Raises:
        ValueError: the text has no "=", or the value is no YAML.
    """
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set takes key=value, got {text!r}")
    try:
        return key, _to_number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ValueError(f"--set takes key=value with a YAML value, got {text!r}") from error


def _to_number(value: Any) -> Any:
    """The value with texts that are numbers as numbers: YAML 1.1 reads 1e-3, without a dot, as
    text."""
    if isinstance(value, dict):
        return {key: _to_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_number(item) for item in value]
    is_number = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
    return float(value) if is_number else value
