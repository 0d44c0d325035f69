"""What dataclasses of settings share: presets, YAML files, key=value changes, and checks."""

import contextlib
import copy
import difflib
from dataclasses import MISSING, asdict, fields

from ..config import check_count
from .yaml_values import read_yaml

# In config.json beside the settings: what tells a run's examples from others.
EXAMPLES = "examples"


def assemble(kind, presets, preset, method, files=(), changes=()):
    """Settings from a preset, then YAML files, then changes, the later ones winning.

    Args:
        kind: the dataclass of the settings. presets: by name, see `moram.trace.presets`.
        preset: its name; holds settings for all methods and some for single ones. None = what a
            file says, or else "paper".
        method: name of the method, unless a file or a change names another.
        files: YAML files with a flat mapping from setting to value.
        changes: dicts of settings. A key may reach into a dict: "method_args.top_k". What a file
            or a change says of method_args is added to what was there.
    Raises:
        ValueError: an unknown preset or setting; the message names the closest ones.
    """
    layers = [read_yaml(path) for path in files] + [dict(c) for c in changes]
    for layer in layers:
        # The config.json of a run says, besides its settings, which examples it had.
        layer.pop(EXAMPLES, None)
    if preset is None:
        preset = next((layer["preset"] for layer in layers if "preset" in layer), "paper")
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}")
    for layer in layers:
        if layer.get("preset", preset) != preset:
            raise ValueError(f"preset is {preset!r}, and a file asks for {layer['preset']!r}")
        method = layer.get("method", method)
    start = copy.deepcopy(presets[preset])
    values = {"preset": preset, "method": method, **start["*"], **start.get(method, {})}
    known = {item.name: item for item in fields(kind)}
    for layer in layers:
        for key, value in layer.items():
            name, _, inner = key.partition(".")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                raise ValueError(
                    f"there is no setting {name!r}"
                    + (f"; close: {', '.join(close)}" if close else "")
                )
            if inner:
                before = values.get(name, _default(known[name]))
                before = before if isinstance(before, dict) else {"*": before}
                value = {**before, inner: value}
            elif name == "method_args" and isinstance(value, dict):
                # A file that sets one argument leaves the preset's others alone.
                value = {**values.get(name, {}), **value}
            values[name] = value
    return kind(**values)


def among(name, value, allowed):
    """Raise unless value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def names_of(name, value):
    """A tuple of names, which may come as one text with commas."""
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name} must be a list of names, got {value!r}")
    return tuple(v.strip() for v in value if v.strip())


def to_beta(value):
    """A number that came in a text with commas."""
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value


def check_number(name, value):
    """Raise unless value is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _default(item):
    return item.default if item.default_factory is MISSING else item.default_factory()


def to_plain(settings):
    """A dataclass of settings as plain types, for JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }


def betas_of(value):
    """Two numbers, which may come as one text with a comma."""
    betas = value.split(",") if isinstance(value, str) else value
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be two numbers in [0, 1), got {value!r}")
    return tuple(map(to_beta, betas))


def check_kinds(settings, texts, flags, numbers, counts, optional_counts):
    """Raise unless settings are of their kinds.

    Args:
        texts, flags, numbers: names of settings. counts: name: the least that it may be.
        optional_counts: names of settings that are None, or at least 1.
    """
    for name in texts:
        if not isinstance(getattr(settings, name), str):
            raise TypeError(f"{name} must be text, got {getattr(settings, name)!r}")
    for name in flags:
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"{name} must be true or false, got {getattr(settings, name)!r}")
    for name in numbers:
        check_number(name, getattr(settings, name))
    for beta in settings.betas:
        check_number("betas", beta)
    for name, least in counts.items():
        check_count(name, getattr(settings, name), least)
    for name in optional_counts:
        if getattr(settings, name) is not None:
            check_count(name, getattr(settings, name), 1)


def value_for(name, value, task):
    """The value of a setting for a task, where it may be a dict by task with "*"."""
    if not isinstance(value, dict):
        return value
    if task in value:
        return value[task]
    if "*" not in value:
        raise ValueError(f'{name} has no value for {task} and no "*"')
    return value["*"]
