"""The config of a PEFT adapter: PEFT's fields, the library's settings, and what is in its files."""

import copy
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Self

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from ..config import MoRAMConfig, check_count
from ..stored import FORMAT
from .card import write_card
from .names import peft_type

# What PEFT trains whole for a task type. It adds some to the caller's config, too late for a copy.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# PEFT has names of its own for the other two.
SETTINGS = tuple(f.name for f in fields(MoRAMConfig) if f.name not in ("targets", "exclude"))

_Settings = make_dataclass(
    "_Settings",
    [(f.name, f.type, field(default=f.default)) for f in fields(MoRAMConfig) if f.name in SETTINGS],
    bases=(PeftConfig,),
)


@dataclass
class MoRAMPeftConfig(_Settings):
    """What PEFT adapts with MoRAM; every setting of `moram.MoRAMConfig` is an argument here, too.

    Args:
        target_modules: names of projections (the ends of their paths), a regular expression for the
            whole path, "all-linear", "auto" (by the model's family), or a preset of
            `moram.models.PRESETS`; None is "auto". A name that matches nothing raises.
        exclude_modules: names or a regular expression, of modules that are left alone.
        layers_to_transform: indices of the blocks to adapt; None is all.
        layers_pattern: the name of the list of blocks, where there is more than one.
        modules_to_save: names of modules that are trained and saved whole, such as a new head.
        atoms_pattern: atoms per task by the end of a path or a regular expression, where they
            differ from atoms_per_task.
        tasks: names of the tasks learned so far, for the model card.
        matrix: R[t, i], percent, the score on task i after task t, for the model card.
    Raises:
        TypeError, ValueError: as `moram.MoRAMConfig`; the files are of another format.

    The other fields are written by the library: they describe what an adapter's files hold.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    atoms_pattern: dict[str, int] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    matrix: list[list[float]] | None = None
    format: int = FORMAT
    settings: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    protection: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprint: dict[str, list[float]] = field(default_factory=dict)
    trained: dict[str, list[int]] | None = None
    other_adapters: bool = False
    # PEFT asks every config for it; nothing but modules is adapted.
    target_parameters: None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Whether a model keeps it up to date.
        self.is_live: bool = False
        self.peft_type = peft_type()
        # What comes from a file.
        if self.format != FORMAT:
            raise ValueError(
                f"format must be {FORMAT}, got {self.format!r}, whose tensors PEFT cannot place; "
                f"moram.load(model, directory) reads 1, and moram.save then writes {FORMAT}"
            )
        unknown = set(self.settings) - {f.name for f in fields(MoRAMConfig)}
        if unknown:
            raise ValueError(
                f"settings hold names this version does not know: {', '.join(sorted(unknown))}"
            )
        for name in SETTINGS:
            if name in self.settings:
                setattr(self, name, self.settings[name])
        self.settings = {}
        self.take_settings(self.settings_of(None))
        if self.target_parameters:
            raise ValueError(
                f"target_parameters must be None, got {self.target_parameters!r}: MoRAM adapts "
                "modules; name them in target_modules"
            )
        for pattern, count in self.atoms_pattern.items():
            check_count(f"atoms_pattern[{pattern!r}]", count, 1)
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def settings_of(self, path: str | None) -> MoRAMConfig:
        """The library's settings for the layer at a path; None for those that all share."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        if path is not None:
            saved = self.layers.get(path, {}).get("atoms_per_task", self.atoms_per_task)
            pattern = get_pattern_key(list(self.atoms_pattern), path)
            settings["atoms_per_task"] = self.atoms_pattern.get(pattern, saved)
        return MoRAMConfig(**settings)

    def take_settings(self, settings: MoRAMConfig) -> None:
        """Take over settings, apart from targets and exclude."""
        for name in SETTINGS:
            setattr(self, name, getattr(settings, name))

    def taken(self) -> Self:
        """A copy for a model, which keeps it up to date; that of a file keeps the file's sizes."""
        own = copy.deepcopy(self)
        if self.is_live:
            own.layers, own.protection, own.fingerprint = {}, {}, {}
            own.tasks, own.matrix, own.trained = [], None, None
        own.is_live = True
        if self.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            names = (*(self.modules_to_save or ()), *HEADS[self.task_type])
            own.modules_to_save = list(dict.fromkeys(names))
        return own

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds: what `moram.save` writes there, too."""
        values = super().to_dict()
        settings = {name: values.pop(name) for name in SETTINGS}
        if self.layers:
            settings |= {"targets": list(self.layers), "exclude": []}
            # The file's tensors say it, and modules_to_save.
            del values["trained"]
        del values["target_parameters"]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], set):
                values[name] = sorted(values[name])
        known = {path: rows for path, rows in values["protection"].items() if rows}
        return values | {"settings": settings, "protection": known}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and what the adapter is into the model card."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(self, save_directory)
