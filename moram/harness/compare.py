"""Which settings make two runs different: for going on with one, and for tables of several."""

import json
from collections.abc import Iterator, Mapping, Set
from typing import Any

from .files import Results
from .settings import StreamSettings


def differences(
    settings: StreamSettings, saved: Mapping[str, Any], tied: Set[str] = frozenset()
) -> list[str]:
    """Settings, among those that change results, in which a run and a saved one differ.

    Args:
        saved: what `to_dict` gave.
        tied: settings that change the method's results, though they are free for others.
    Returns:
        Lines "name: saved value -> value".
    """
    free = settings.with_rule("free") - settings.tied - tied
    # As a file holds them: lists for tuples, also inside.
    now = json.loads(json.dumps(settings.to_dict()))
    return [
        f"{name}: {saved.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(now.keys() | saved.keys())
        if name not in free and saved.get(name) != now.get(name)
    ]


def groups(runs: list[Results], kind: type[StreamSettings]) -> dict[str, list[Results]]:
    """Runs by name, with the settings that differ among those of one method.

    Args:
        runs: list of results. kind: the class of their settings.
    Returns:
        A dict from name to a list of runs, which differ in their order and seed alone.
    Raises:
        ValueError: two runs differ in nothing.
    """
    settings = [{k: json.dumps(v) for k, v in _flat(run["settings"], kind)} for run in runs]
    found: dict[str, list[Results]] = {}
    seen = set()
    for run, own in zip(runs, settings, strict=True):
        same = [other for r, other in zip(runs, settings, strict=True) if r["name"] == run["name"]]
        keys = sorted({key for other in same for key in other})
        varied = [key for key in keys if len({other.get(key) for other in same}) > 1]
        label = ", ".join(f"{key} {own.get(key, '-')}" for key in varied)
        name = f"{run['name']} ({label})" if label else run["name"]
        identity = (name, run["settings"].get("seed"), *run["tasks"])
        if identity in seen:
            raise ValueError(f"two runs of {name} have the same order and seed: give one of them")
        seen.add(identity)
        found.setdefault(name, []).append(run)
    return found


def _flat(settings: Mapping[str, Any], kind: type[StreamSettings]) -> Iterator[tuple[str, Any]]:
    passed = kind.with_rule("free") | kind.with_rule("same_row")
    for key, value in settings.items():
        if key in passed:
            continue
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value
