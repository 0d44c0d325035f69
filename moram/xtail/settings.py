"""Every setting of a run over image domains in one checked dataclass."""

from dataclasses import dataclass, field
from pathlib import Path

from ..harness.settings import (
    among,
    assemble,
    betas_of,
    check_kinds,
    check_number,
    names_of,
    to_plain,
    value_for,
)
from ..methods.train import TrainSettings
from .catalog import MTIL, XTAIL
from .presets import PRESETS

SMALL_BACKBONE = "small"
STREAMS = {("xtail",): XTAIL, ("mtil",): MTIL}
_TEXTS = ("backbone", "pretrained", "data_dir", "out", "method", "label", "preset", "schedule")
_TEXTS += ("device",)
_FLAGS = ("text_loss", "skip_bad", "held_out", "spaces", "untrained", "quiet", "tensorboard")
_NUMBERS = ("dropout", "label_smoothing", "cache_gib", "save_seconds")
# Whole numbers, and the least each may be.
_COUNTS = {"shots": 1, "rank": 1, "iterations": 1, "batch_size": 1, "eval_batch": 1, "seed": 0}
_COUNTS |= {"workers": 1, "warmup": 0}


@dataclass(frozen=True)
class XtailSettings:
    """What `run_xtail` takes.

    Args:
        backbone, pretrained: see `moram.models.clip.load_clip`; "small" is the small CLIP, which
            is pretrained on the first run.
        data_dir: folder of the datasets. The drawn domains of the preset "small" need none.
        datasets: names, in the order they are learned: of `moram.xtail.catalog.FACTS`, of
            `moram.xtail.small`, or folders NAME/{train,test}/CLASS/IMAGE in data_dir. "xtail" and
            "mtil" alone are those streams of ten and eleven.
        method, method_args: see `moram.methods.registry`.
        label: the name that tables show, by which they group runs; empty = the method's own.
        preset: the settings that this one started from, for the record.
        targets, exclude: as in `MoRAMConfig`, for every method.
        shots: training images per class, drawn by seed and dataset alone.
        rank: of LoRA, atoms a task of MoRAM. dropout: of the adapters' inputs in training.
        lr: see `TrainSettings`; a number, or a dict from dataset to number with "*" for the others.
        iterations, batch_size, schedule, warmup, betas, clip, seed: see `TrainSettings`.
        text_loss: whether the loss from prompts to images is added to the one from images to
            prompts; it never is where the image encoder is not adapted. label_smoothing: of the
            latter.
        spaces: underscores in class names become spaces in every dataset, as RAIL does it.
        skip_bad: leave out images that cannot be decoded, instead of refusing to run.
        held_out: score the training images that were not drawn, instead of the test images: for
            choosing settings.
        eval_limit: at most so many test images a dataset, evenly spaced; None = all.
        eval_batch: test images encoded at once.
        untrained: also score the untouched model.
        cache_gib: decoded images are kept in memory up to that many GiB (2^30 bytes).
        workers: threads that decode. threads: of torch; None = torch's choice.
        device: "auto" (CUDA if there is one), or a torch device.
        quiet, tensorboard: as named. save_seconds: how often the state is written within a task.
        out: folder for everything the run writes.
    Raises:
        TypeError, ValueError: a setting is of the wrong kind or out of range; names it.
    """

    backbone: str = "ViT-B-16"
    pretrained: str = "auto"
    data_dir: str = ""
    out: str = "out/xtail"
    datasets: tuple = ()
    method: str = "moram"
    method_args: dict = field(default_factory=dict)
    label: str = ""
    preset: str = "paper"
    targets: str | tuple = "auto"
    exclude: tuple = ()
    shots: int = 16
    rank: int = 16
    dropout: float = 0.0
    lr: float | dict = 5e-4
    iterations: int = 500
    batch_size: int = 64
    schedule: str = "cosine"
    warmup: int = 0
    betas: tuple = (0.9, 0.9999)
    clip: float | None = None
    seed: int = 42
    text_loss: bool = True
    label_smoothing: float = 0.0
    spaces: bool = False
    skip_bad: bool = False
    held_out: bool = False
    eval_limit: int | None = None
    eval_batch: int = 256
    untrained: bool = True
    cache_gib: float = 4.0
    workers: int = 1
    threads: int | None = None
    device: str = "auto"
    quiet: bool = False
    tensorboard: bool = False
    save_seconds: float = 120.0

    def __post_init__(self):
        for name in ("datasets", "exclude"):
            object.__setattr__(self, name, names_of(name, getattr(self, name)))
        if self.targets != "auto" and not isinstance(self.targets, str):
            object.__setattr__(self, "targets", names_of("targets", self.targets))
        object.__setattr__(self, "betas", betas_of(self.betas))
        for name in ("data_dir", "out", "pretrained"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        self._check_types()
        for name in ("backbone", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        if self.datasets in STREAMS:
            object.__setattr__(self, "datasets", STREAMS[self.datasets])
        if not self.datasets:
            raise ValueError("datasets must name at least one")
        if len(set(self.datasets)) != len(self.datasets):
            raise ValueError(f"datasets must differ, got {', '.join(self.datasets)}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("cache_gib", "save_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        among("preset", self.preset, tuple(PRESETS))
        if isinstance(self.lr, dict) and "*" not in self.lr:
            missing = [name for name in self.datasets if name not in self.lr]
            if missing:
                raise ValueError(f'lr has no value for {", ".join(missing)} and no "*"')
        for name in self.datasets:
            _ = self.train_settings(name)

    def _check_types(self):
        check_kinds(self, _TEXTS, _FLAGS, _NUMBERS, _COUNTS, ("eval_limit", "threads"))
        for value in self.lr.values() if isinstance(self.lr, dict) else (self.lr,):
            check_number("lr", value)
        if self.clip is not None:
            check_number("clip", self.clip)
        if not isinstance(self.method_args, dict) or not all(
            isinstance(key, str) for key in self.method_args
        ):
            raise TypeError(f"method_args must be a mapping from names, got {self.method_args!r}")

    def train_settings(self, dataset):
        """The part that `TaskTrainer` takes, for a dataset."""
        return TrainSettings(
            lr=value_for("lr", self.lr, dataset),
            batch_size=self.batch_size,
            clip=self.clip,
            seed=self.seed,
            schedule=self.schedule,
            warmup=self.warmup,
            betas=self.betas,
            drop_last=False,
            iterations=self.iterations,
        )

    def to_dict(self):
        """Plain types, for JSON."""
        return to_plain(self)


def make_settings(preset="paper", method="moram", files=(), changes=()):
    """`XtailSettings` from a preset, then YAML files, then changes, the later ones winning.

    Args, Raises: see `moram.harness.settings.assemble`.
    """
    return assemble(XtailSettings, PRESETS, preset, method, files, changes)
