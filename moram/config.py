"""All settings of MoRAM in one checked dataclass. No tensors and no models live here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Self

from moram_kernels import SelfActivation
from moram_kernels.api import BACKENDS, PRECISIONS

ATOM_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class MoRAMConfig:
    """What is adapted, how many atoms a task gets, and how they fire.

    Args:
        atoms_per_task: atoms appended per task and projection (r), >= 1.
        top_k: atoms selected per token, >= 1, clipped to the atoms that exist.
        temperature: softmax temperature over the selected atoms, > 0.
        threshold: at inference, atoms whose normalised score is below it write nothing;
            in [0, 1), 0 = off.
        value_scale: factor on the current values (alpha / r of LoRA), > 0. It is folded into the
            values when they freeze, so freezing changes no output.
        dropout: probability of dropping an input feature before the keys see it, in [0, 1).
        eps: lower bound of the norm that scores are divided by, > 0.
        targets: "auto" (by the model's family), the name of a preset (`moram.models.PRESETS`), or
            names of projections: a suffix of the module's path ("q_proj", "layers.0.mlp.up_proj")
            or a pattern with * ("visual.*.c_fc").
        exclude: names or patterns like targets, of modules that are left alone with all that is
            inside them.
        backend: "auto", "reference", "torch" or "triton".
        precision: of the Triton backend's float32 products, "ieee" or "bf16x6" (faster on tensor
            cores, as exact to a few roundings).
        atom_dtype: dtype of keys and values; float32 keeps small updates that bfloat16 loses. Next
            to a 16-bit model, 16-bit atoms are the ones that run on tensor cores as they are.
        protect: this project's addition to the published rule, for `moram.task`: the keys of later
            tasks stay out of the directions that hold this part of the second moment of earlier
            tasks' inputs, in (0, 1); None, the default, is the published rule.
        protect_size: of these directions, how many a layer keeps at most, >= 1.
        protect_examples: how many examples of a task they are measured on, in whole batches, >= 1.
        protect_strength: of new atoms' first scores against the frozen ones', > 0. A full one (1)
            amplifies what earlier inputs have outside the protected directions, and was seen to
            destroy earlier tasks.
        alignment: this project's addition to the published rule: at inference no atom writes at an
            input whose cosine with the key of its highest-scoring atom is below it; in [0, 1),
            0, the default, = off.
        capacity: frozen atoms that the bank has room for from the start; None = 8 tasks. It doubles
            when full. torch.compile compiles again when the capacity changes, not when a task does.
    Raises:
        TypeError, ValueError: a setting is of the wrong kind or out of range; the message names it.
    """

    atoms_per_task: int = 8
    top_k: int = 8
    temperature: float = 0.03
    threshold: float = 0.2
    value_scale: float = 8.0
    dropout: float = 0.0
    eps: float = 1e-12
    targets: str | tuple[str, ...] = "auto"
    exclude: tuple[str, ...] = ()
    backend: str = "auto"
    precision: str = "ieee"
    atom_dtype: str = "float32"
    capacity: int | None = None
    protect: float | None = None
    protect_size: int = 256
    protect_examples: int = 80
    protect_strength: float = 0.5
    alignment: float = 0.0

    def __post_init__(self) -> None:
        check_count("atoms_per_task", self.atoms_per_task, 1)
        # Building it checks its settings.
        _ = self.activation
        if self.capacity is not None:
            check_count("capacity", self.capacity, 0)
        for name in ("protect_size", "protect_examples"):
            check_count(name, getattr(self, name), 1)
        for name in ("value_scale", "dropout", "protect_strength", "protect", "alignment"):
            value = getattr(self, name)
            if name == "protect" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.protect is not None and not 0 < self.protect < 1:
            raise ValueError(f"protect must be in (0, 1) or None, got {self.protect}")
        if not 0 < self.protect_strength < float("inf"):
            raise ValueError(
                f"protect_strength must be finite and > 0, got {self.protect_strength}"
            )
        if not 0 < self.value_scale < float("inf"):
            raise ValueError(f"value_scale must be finite and > 0, got {self.value_scale}")
        for name in ("dropout", "alignment"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.atom_dtype not in ATOM_DTYPES:
            raise ValueError(
                f"atom_dtype must be one of {', '.join(ATOM_DTYPES)}, got {self.atom_dtype!r}"
            )
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", _names("targets", self.targets))
            if not self.targets:
                raise ValueError('targets must name at least one projection or be "auto", got ()')
        object.__setattr__(self, "exclude", _names("exclude", self.exclude))
        # Plain Python numbers from here on, whatever kind of number came.
        counts = ("atoms_per_task", "top_k", "capacity", "protect_size", "protect_examples")
        numbers = ("temperature", "threshold", "value_scale", "dropout", "eps", "protect")
        for names, kind in ((counts, int), ((*numbers, "protect_strength", "alignment"), float)):
            for name in names:
                if getattr(self, name) is not None:
                    object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def activation(self) -> SelfActivation:
        """The part of the settings that the operator takes."""
        return SelfActivation(self.top_k, self.temperature, self.threshold, self.eps)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The paper's settings for a benchmark: "trace" (language) or "xtail" (CLIP)."""
        presets = {
            "trace": {
                "atoms_per_task": 8,
                "top_k": 8,
                "temperature": 0.03,
                "threshold": 0.2,
                "value_scale": 2.0,
                "dropout": 0.1,
            },
            "xtail": {
                "atoms_per_task": 16,
                "top_k": 16,
                "temperature": 0.01,
                "threshold": 0.2,
                "value_scale": 1.0,
            },
        }
        if name not in presets:
            raise ValueError(f"preset must be one of {', '.join(presets)}, got {name!r}")
        return cls(**(presets[name] | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; an unknown name raises ValueError."""
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"settings hold names this version does not know: {', '.join(unknown)}"
            )
        return cls(**settings)


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def _names(argument: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) and v for v in value):
        raise TypeError(f"{argument} must be a tuple of non-empty strings, got {value!r}")
    return tuple(value)
