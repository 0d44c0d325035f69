"""A run over image domains: train, score on all datasets, write."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..harness.files import Results
from ..harness.progress import Log
from ..harness.run import Run, Stopped, versions
from ..methods.base import Classifier
from ..models.clip import Clip, load_clip
from .data.domains import Domain, Split
from .images import ImageRows, ImageStore, TestImages, Transforms
from .objective import ImageStage
from .plan import XtailPlan
from .pretrain import small_clip
from .report import REPORT, per_dataset, whole_matrix
from .settings import SMALL_BACKBONE, XtailSettings

# The image encoders of open_clip's and Hugging Face's CLIP.
VISION = ("visual.", "vision_model.")
# Images that cannot be decoded, and classes, named for each dataset at most.
NAMED = 10

__all__ = ["Stopped", "XtailRun", "run_xtail"]


def run_xtail(
    settings: XtailSettings,
    log: Log = print,
    stop: Callable[[], bool] = lambda: False,
    clip: Clip | None = None,
) -> Results:
    """Learn the datasets one after the other and score all after each; go on where a run stopped.

    Args:
        settings: of the run. log: called with lines of text.
        stop: asked after every step; if it returns true, the state is saved and `Stopped` raised.
        clip: to use instead of loading the backbone; it is changed.
    Returns:
        What was written to results.json.
    Raises:
        ValueError, OSError: bad settings, data, model or folder, named before any training.
        Stopped: see `stop`.
    """
    return XtailRun(settings, log, stop, clip).execute()


class XtailRun(Run):
    """A run over image domains.

    Args: see `run_xtail` and `Run`.
    """

    report = REPORT
    settings: XtailSettings
    plan: XtailPlan
    stream: list[Domain]
    # The model that was given, or that `load` loads.
    clip: Clip
    store: ImageStore
    adapts_images: bool
    transforms: Transforms
    test: list[TestImages]
    prompt_ids: Tensor
    classify: Classifier

    def __init__(
        self,
        settings: XtailSettings,
        log: Log = print,
        stop: Callable[[], bool] = lambda: False,
        clip: Clip | None = None,
    ) -> None:
        device = None if settings.device == "auto" else torch.device(settings.device)
        # What a launcher of several processes sets.
        if "RANK" in os.environ:
            from accelerate import PartialState

            on_cpu = not torch.cuda.is_available() if device is None else device.type == "cpu"
            device = PartialState(cpu=on_cpu).device
        super().__init__(settings, log, stop, device)
        self.given = clip
        # After which stage `classify` was made.
        self.classified: int | str | None = None
        self.store = ImageStore(settings.cache_gib, settings.workers)

    def make_plan(self) -> XtailPlan:
        return XtailPlan(self.settings, self.log)

    def load(self) -> None:
        """Load the model, unless one was given."""
        clip = self.given
        if clip is None:
            backbone = self.settings.backbone
            if backbone == SMALL_BACKBONE:
                made = self.processes.first_then_others(lambda: small_clip(log=self.log))
                backbone = f"local-dir:{made}"
            # Random weights, where they are asked for, are those of the seed: a run may go on.
            torch.manual_seed(self.settings.seed)
            clip = load_clip(backbone, self.settings.pretrained, self.device)
        self.clip, self.model = clip, clip.model

    def made(self) -> None:
        """Check that the adapters are where they must be, then decode every image once."""
        settings, trained = self.settings, any(self.plan.stages)
        self.adapts_images = any(path.startswith(VISION) for path in self.adapters)
        if self.method.has_steps and trained:
            self.check_encoder()
        self.transforms = Transforms(self.clip.preprocess)
        self.decode(trained)
        frozen = self.method.has_frozen_features
        common = (self.store, self.transforms)
        self.test = [TestImages(self.clip, d.test, *common, frozen) for d in self.stream]
        self.prompt_ids = self.clip.tokens(self.plan.prompts)
        texts = len(set(self.plan.prompts))
        rows = len(set(map(tuple, self.prompt_ids.tolist())))
        if rows < texts:
            self.log(
                f"{texts - rows} prompts are cut to the same tokens as others: "
                f"{settings.backbone} reads {self.prompt_ids.shape[1]}"
            )

    def check_encoder(self) -> None:
        """Refuse a model whose image encoder cannot be adapted, or would change by itself."""
        if any(hasattr(module, "running_mean") for module in self.model.modules()):
            raise ValueError(
                f"{self.settings.backbone} has batch normalisation in its image encoder, whose "
                "statistics training would change; take a backbone with a transformer"
            )
        if self.settings.targets == "auto" and not (
            self.adapts_images or self.method.has_frozen_features
        ):
            raise ValueError(
                f"the image encoder of {self.settings.backbone} has nothing to adapt; name the "
                "projections with targets, or take a backbone with a transformer"
            )

    def decode(self, trained: bool) -> None:
        """Decode all images that will be needed; those that cannot be are an error, or left out.

        Test images first: they are read after every task, training images in one task alone.
        """
        total = sum(len(d.test) + len(d.train) * trained for d in self.stream)
        find, test = self.store.find_bad, self.transforms.test
        with self.watch("images", total) as bar:
            tests = [find(d.test, test, bar.advance) for d in self.stream]
            trains = [find(d.train, None, bar.advance) if trained else {} for d in self.stream]
        bad = list(zip(tests, trains, strict=True))
        reasons = [list(dict.fromkeys([*t.values(), *r.values()])) for t, r in bad]
        lines = [
            f"{domain.name}: {len(found)} images cannot be decoded: {'; '.join(found[:NAMED])}"
            + ("; ..." if len(found) > NAMED else "")
            for domain, found in zip(self.stream, reasons, strict=True)
            if found
        ]
        if lines and not self.settings.skip_bad:
            raise ValueError(f"{' | '.join(lines)}. With skip_bad they are left out")
        for line in lines:
            self.log(f"{line}; left out")
        self.plan.leave_out(bad, trained)
        self.stream = self.plan.stream
        for domain in self.stream:
            self.log(
                f"{domain.name}: {len(domain.classes)} classes, {len(domain.train)} train, "
                f"{len(domain.test)} test images"
            )
            lost = self.plan.unscored.get(domain.name)
            if lost:
                self.log(
                    f"{domain.name}: {len(lost)} of {len(domain.classes)} classes have no test "
                    f"image and are not scored: {', '.join(lost[:NAMED])}"
                    + (", ..." if len(lost) > NAMED else "")
                )
        self.log(
            f"{len(self.plan.prompts)} classes in all; the cache has "
            f"{self.store.left / 2**30:.1f} GiB left"
        )

    def stage(self, members: Sequence[int]) -> ImageStage:
        """The training images of one dataset, or of all together."""
        settings = self.settings
        domains = [self.stream[i] for i in members]
        split, prompts = domains[0].train, domains[0].prompts
        if len(domains) > 1:
            split = Joined([d.train for d in domains], [len(d.classes) for d in domains])
            prompts = [prompt for d in domains for prompt in d.prompts]
        data = ImageRows(
            self.clip,
            split,
            prompts,
            self.plan.offsets[members[0]],
            self.store,
            self.transforms,
            settings.text_loss and self.adapts_images,
            settings.label_smoothing,
        )
        # Of the crops that hooks see, not of those that are trained on.
        seed = settings.seed * 1000 + members[0]
        train = self.plan.train_settings(members)
        return ImageStage(self.model, data, train, seed, self.method.image_loss)

    @torch.no_grad()
    def score_task(self, number: int | str, i: int) -> dict[str, Any]:
        """Classify a dataset's test images among the classes of all datasets."""
        self.model.eval()
        if self.classified != number:
            # Once for all datasets: encoding the prompts is a large part of scoring.
            self.classify = self.method.classifier(self.clip, self.prompt_ids)
            self.classified = number
        images, found = self.test[i], []
        for batch in self.processes.share(list(images.batches(self.settings.eval_batch))):
            found.append(self.classify(batch).argmax(1).tolist())
            self.progress.answered(len(batch) * self.processes.world)
        answers = [answer for batch in self.processes.gather(found) for answer in batch]
        truth = (images.labels + self.plan.offsets[i]).tolist()
        right = sum(a == b for a, b in zip(answers, truth, strict=True))
        score = {"score": 100 * right / len(truth), "metric": "accuracy over all classes"}
        return {"eval": score, "results": answers, "labels": truth}

    def execute(self) -> Results:
        """Run to the end, and let the decoding threads go."""
        try:
            return super().execute()
        finally:
            self.store.close()

    def more_results(self, results: Results) -> dict[str, Any]:
        matrix = whole_matrix(results)
        whole = len(matrix) == len(self.stream)
        return {
            "per_dataset": per_dataset(matrix) if whole else None,
            "classes": [len(domain.classes) for domain in self.stream],
            "test_images": [len(domain.test) for domain in self.stream],
            "unscored": self.plan.unscored,
            "trained_with_steps": self.method.has_steps,
            "needs_task_id": self.method.needs_task_id,
            "processes": self.processes.world,
            "versions": versions("open_clip", "transformers", "sklearn"),
        }


class Joined:
    """The training images of several datasets as one split, with joint labels."""

    def __init__(self, splits: Sequence[Split], classes: Sequence[int]) -> None:
        self.labels: list[int] = []
        self.places: list[tuple[Split, int]] = []
        first = 0
        for split, count in zip(splits, classes, strict=True):
            self.labels += [first + label for label in split.labels]
            self.places += [(split, row) for row in range(len(split))]
            first += count

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """What messages call an image."""
        split, row = self.places[row]
        return split.name(row)

    def load(self, row: int) -> Image.Image:
        """An image in RGB."""
        split, row = self.places[row]
        return split.load(row)
