"""A run over image domains: train, score on all datasets, write."""

import torch

from .. import checkpoint
from ..harness.run import Run, Stopped, pick_device, versions
from ..methods.processes import Processes
from ..models.clip import load_clip
from .domains import take
from .images import ImageRows, ImageStore, TestImages, Transforms
from .objective import ImageStage
from .plan import Plan
from .pretrain import small_clip
from .report import FORMAT, per_dataset, summarise, whole_matrix, write_report
from .settings import SMALL_BACKBONE

__all__ = ["Stopped", "XtailRun", "run_xtail"]


def run_xtail(settings, log=print, stop=lambda: False, clip=None):
    """Learn the datasets one after the other and score all after each; go on where a run stopped.

    Args:
        settings: `XtailSettings`.
        log: called with lines of text.
        stop: asked after every step; if it returns true, the state is saved and `Stopped` raised.
        clip: a `Clip` to use instead of loading the backbone; it is changed.
    Returns:
        What was written to results.json.
    Raises:
        ValueError, OSError: bad settings, data, model or folder, named before any training.
        Stopped: see `stop`.
    """
    processes = Processes()
    if processes.world > 1:
        raise ValueError(f"moram xtail runs in one process, got {processes.world}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    log = (lambda line: None) if settings.quiet else log
    device = pick_device() if settings.device == "auto" else torch.device(settings.device)
    return XtailRun(settings, processes, device, log, stop, clip).execute()


class XtailRun(Run):
    """See `run_xtail`."""

    summarise, report = staticmethod(summarise), staticmethod(write_report)

    def __init__(self, settings, processes, device, log, stop, clip=None):
        super().__init__(settings, processes, device, log, stop)
        self.clip, self.classified = clip, None

    def make_plan(self):
        return Plan(self.settings, self.log)

    def load(self):
        """Load the model, and decode every image once."""
        settings = self.settings
        if self.clip is None:
            backbone = settings.backbone
            if backbone == SMALL_BACKBONE:
                backbone = f"local-dir:{small_clip(log=self.log)}"
            self.clip = load_clip(backbone, settings.pretrained, self.device)
        self.model = self.clip.model
        self.transforms = Transforms(self.clip.preprocess)
        self.store = ImageStore(settings.cache_gib, settings.workers)
        trained = any(self.plan.stages)
        self.stream = [self._without_bad(domain, trained) for domain in self.stream]
        self.log(
            f"{len(self.plan.prompts)} classes in all; the cache has "
            f"{self.store.left / 2**30:.1f} GiB left"
        )

    def _without_bad(self, domain, trained):
        """Decode a dataset's images; those that cannot be are an error, or left out."""
        kept, bad = {}, {}
        for name, split, prepare in (
            ("train", domain.train, None),
            ("test", domain.test, self.transforms.test),
        ):
            found = {}
            if trained or name == "test":
                found = self.store.find_bad(split, prepare=prepare)
            bad |= {(name, row): reason for row, reason in found.items()}
            rows = [row for row in range(len(split)) if row not in found]
            kept[name] = take(split, rows) if found else split
        if bad:
            reasons = list(dict.fromkeys(bad.values()))
            named = "; ".join(reasons[:10]) + ("; ..." if len(reasons) > 10 else "")
            text = f"{domain.name}: {len(reasons)} images cannot be decoded: {named}"
            if not self.settings.skip_bad:
                raise ValueError(f"{text}. With skip_bad they are left out")
            self.log(f"{text}; left out")
            present = set(kept["train"].labels)
            if trained and len(present) < len(domain.classes):
                lost = [c for label, c in enumerate(domain.classes) if label not in present]
                raise ValueError(f"{domain.name} has no image left of {', '.join(lost)}")
            if not len(kept["test"]):
                raise ValueError(f"{domain.name} has no test image left")
        self.log(
            f"{domain.name}: {len(domain.classes)} classes, {len(kept['train'])} train, "
            f"{len(kept['test'])} test images"
        )
        return domain._replace(**kept)

    def made(self):
        if self.method.has_steps and any(self.plan.stages):
            self.check_encoder()
        frozen = self.method.has_frozen_features
        common = (self.store, self.transforms)
        self.test = [TestImages(self.clip, d.test, *common, frozen) for d in self.stream]
        self.prompt_ids = self.clip.tokens(self.plan.prompts)

    def check_encoder(self):
        """Refuse a model whose image encoder cannot be adapted, or would change by itself."""
        if any(hasattr(m, "running_mean") for m in self.model.modules()):
            raise ValueError(
                f"{self.settings.backbone} has batch normalisation in its image encoder, whose "
                "statistics training would change; take a backbone with a transformer"
            )
        if self.settings.targets == "auto" and not any(
            path.startswith(("visual.", "vision_model.")) for path in self.adapters
        ):
            raise ValueError(
                f"the image encoder of {self.settings.backbone} has nothing to adapt; name the "
                "projections with targets, or take a backbone with a transformer"
            )

    def stage(self, members):
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
            settings.text_loss,
            settings.label_smoothing,
        )
        # Of the crops that hooks see, not of those that are trained on.
        seed = settings.seed * 1000 + members[0]
        return ImageStage(self.model, data, settings.train_settings(), seed)

    @torch.no_grad()
    def score_task(self, number, i):
        """Classify a dataset's test images among the classes of all datasets."""
        self.model.eval()
        if self.classified != number:
            # Once for all datasets: encoding the prompts is a large part of scoring.
            self.classify = self.method.classifier(self.clip, self.prompt_ids)
            self.classified = number
        images, answers = self.test[i], []
        for batch in images.batches(self.settings.eval_batch):
            answers += self.classify(batch).argmax(1).tolist()
            self.progress.answered(len(batch))
        truth = (images.labels + self.plan.offsets[i]).tolist()
        right = sum(a == b for a, b in zip(answers, truth, strict=True))
        score = {"score": 100 * right / len(truth), "metric": "accuracy over all classes"}
        return {"eval": score, "results": answers, "labels": truth}

    def save_adapters(self, folder):
        """Write the adapters as PEFT lays them out."""
        tasks = [domain.name for domain in self.stream]
        checkpoint.save(self.model, folder, tasks=tasks, base_model=self.settings.backbone)

    def more_results(self, results):
        """What results.json holds besides what every run writes."""
        matrix = whole_matrix(results)
        whole = len(matrix) == len(self.stream)
        return {
            "per_dataset": per_dataset(matrix) if whole else None,
            "format": FORMAT,
            "classes": [len(domain.classes) for domain in self.stream],
            "test_images": [len(domain.test) for domain in self.stream],
            "trained_with_steps": self.method.has_steps,
            "needs_task_id": self.method.needs_task_id,
            "versions": versions("open_clip", "transformers", "sklearn"),
        }


class Joined:
    """The training images of several datasets as one split, with joint labels."""

    def __init__(self, splits, classes):
        self.splits, self.labels, self.places = splits, [], []
        first = 0
        for split, count in zip(splits, classes, strict=True):
            self.labels += [first + label for label in split.labels]
            self.places += [(split, row) for row in range(len(split))]
            first += count

    def __len__(self):
        return len(self.labels)

    def name(self, row):
        """What messages call an image."""
        split, row = self.places[row]
        return split.name(row)

    def load(self, row):
        """An image in RGB."""
        split, row = self.places[row]
        return split.load(row)
