"""The settings of a run over image domains: what they have besides those of every stream."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..harness.describe import Presets
from ..harness.settings import StreamSettings
from ..harness.values import FRACTION, NOT_NEGATIVE, setting
from ..methods.train import TrainSettings
from .data.catalog import MTIL, XTAIL
from .presets import PRESETS

SMALL_BACKBONE = "small"
STREAMS: dict[tuple[str, ...], tuple[str, ...]] = {("xtail",): XTAIL, ("mtil",): MTIL}


@dataclass(frozen=True)
class XtailSettings(StreamSettings):
    """What `run_xtail` takes; `StreamSettings` has the settings that are not named here.

    Args:
        backbone, pretrained: see `moram.models.clip.load_clip`; "small" is the small CLIP, which
            is pretrained on the first run.
        data_dir: folder of the datasets. The drawn domains of the preset "small" need none.
        datasets: names, in the order they are learned: of `moram.xtail.data.catalog.FACTS`, of
            `moram.xtail.data.small`, or folders NAME/{train,test}/CLASS/IMAGE in data_dir. "xtail"
            and "mtil" alone are those streams of ten and eleven.
        shots: training images per class, drawn by seed and dataset alone.
        lr: a number, or a dict from dataset to number with "*" for the others.
        iterations, warmup: see `TrainSettings`.
        text_loss: whether the loss from prompts to images is added to the one from images to
            prompts; it never is where the image encoder is not adapted. label_smoothing: of the
            latter.
        spaces: underscores in class names become spaces in every dataset, as RAIL does it.
        skip_bad: leave out images that cannot be decoded, instead of refusing to run.
        held_out: score the training images that were not drawn, instead of the test images: for
            choosing settings.
        eval_limit: at most so many test images a dataset, evenly spaced; None = all.
        cache_gib: decoded images are kept in memory up to that many GiB (2^30 bytes).
        workers: threads that decode.
        device: "auto" (CUDA if there is one), or a torch device.
    """

    presets: ClassVar[Presets] = PRESETS
    words: ClassVar[dict[str, str]] = {"tasks": "datasets", "data": "data_dir", "model": "backbone"}
    choosing: ClassVar[dict[str, Any]] = {"held_out": True}
    model_kind: ClassVar[str | None] = "clip"
    elsewhere: ClassVar[str] = "; see moram trace"
    tells_task: ClassVar[bool] = False

    backbone: str = setting("ViT-B-16", given=True)
    pretrained: str = "auto"
    data_dir: str = setting("", same_row=True)
    out: str = "out/xtail"
    datasets: tuple[str, ...] = setting((), same_row=True)
    shots: int = 16
    rank: int = 16
    lr: float | dict[str, float] = 5e-4
    iterations: int = 500
    batch_size: int = 64
    schedule: str = "cosine"
    warmup: int = setting(0, least=0)
    betas: tuple[float, float] = (0.9, 0.9999)
    clip: float | None = None
    seed: int = 42
    text_loss: bool = True
    label_smoothing: float = setting(0.0, within=FRACTION)
    spaces: bool = False
    skip_bad: bool = False
    held_out: bool = False
    eval_batch: int = 256
    cache_gib: float = setting(4.0, within=NOT_NEGATIVE, free=True)
    workers: int = setting(1, free=True)
    device: str = setting("auto", free=True)

    def complete(self) -> None:
        self.put("datasets", STREAMS.get(self.datasets, self.datasets))

    def train_settings(self, task: str) -> TrainSettings:
        # Few images may not fill a batch.
        return replace(super().train_settings(task), drop_last=False)


make_settings = XtailSettings.make
