"""LADA: units of memory for each class behind the frozen image encoder, old classes replayed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..inject import adapters
from ..layers.adaptformer import AdaptFormerMLP
from ..layers.label_memory import LabelMemory
from ..models.clip import Clip
from .base import Classifier, EncodedBatch, Images, ImageStage, Method, check_order
from .clusters import gaussian_mixture, kmeans
from .moe_adapters import find_blocks

# Images encoded at once to find centres.
READ = 64
# What is kept of a mixture.
MIXTURE = ("means", "variances", "weights")


class LADA(Method):
    """Units per class behind the frozen image encoder, and text features kept from their task.

    With f an image's unit features, t_c the text features of class c and s the model's scale,

        score_c(f) = s f . t_c + strength * sum over units w of c of exp(-sharpness (1 - w . f)).

    When a task begins, the units of each of its classes are the k-means centres of the class's
    training features, and every block of the text encoder gets a fresh bottleneck
    (`AdaptFormerMLP`). Both are trained, all of earlier tasks stays. When it ends, the text
    features of its classes are kept, the bottlenecks leave, and a mixture of spherical Gaussians is
    fitted to each class's training features. A step's loss is a sum over all classes so far, here
    divided by their number,

        sum over current c of CE of its images  +  replay * sum over earlier c, l of pi_cl CE(p_cl)

    where CE is the cross-entropy among all classes so far, and p_cl is drawn anew in each step from
    component l of c, with weight pi_cl. The mean over the batch times the number of the task's
    classes stands for the first sum.

    At test classes to come have the original model's texts. Where the best text is a learned
    class's, the answer is among learned classes, by score_c; elsewhere it is the best text.

    Sources of its parts: the equations of units, losses and mixture were read in two summaries of
    the paper; AdaptFormer, the rule at test, `strength` and `sharpness` in public copies of the
    authors' code. Deviations: mixtures are fitted to unit features (there before normalisation);
    k-means and mixtures draw nothing; no weight decay (5e-4 there); the run's schedule. The
    authors' code weighs the drawn features by 64 pi in a mean with 64 images: an earlier class then
    counts as much as all current ones together, replay = classes of a task here.

    Needs no task id. Stores the units, the text features and the mixture of each learned class.
    Trained per task: units * E for each of its classes, and 2 W D + W + 3 D + 1 in each block of
    the text encoder, of width D. In a ViT-B/16: 8,192 a class and 215,244.

    Args:
        units: of a class; fewer where it has fewer images.
        components: of a class's mixture; fewer where it has fewer images.
        width: of the bottlenecks, W.
        sharpness: > 0. strength: of the units' scores, >= 0. replay: of earlier classes, >= 0.
        seed: of the bottlenecks and of what is drawn from mixtures.
    Source: Luo et al., "LADA: Scalable Label-Specific CLIP Adapter for Continual Learning", ICML
        2025, arXiv 2505.23271.
    Cost: no gradient goes through the image encoder; 2 * units * E FLOPs a class and image.
    """

    name = "LADA"
    needs = "clip"
    has_frozen_features = True
    units: int
    components: int
    width: int
    sharpness: float
    strength: float
    replay: float

    def __init__(
        self,
        units: int = 16,
        components: int = 4,
        width: int = 16,
        sharpness: float = 1.0,
        strength: float = 1.0,
        replay: float = 1.0,
        seed: int = 0,
    ) -> None:
        for name, count in (("units", units), ("components", components), ("width", width)):
            check_count(name, count, 1)
        for name, value in (("strength", strength), ("replay", replay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not 0 < sharpness < float("inf"):
            raise ValueError(f"sharpness must be finite and > 0, got {sharpness}")
        self.units, self.components, self.width = units, components, width
        self.sharpness, self.strength, self.replay = sharpness, strength, replay
        self.generator = torch.Generator().manual_seed(seed)
        # Of learned classes, in their order: "texts" [C, E], and of all components "means" [P, E],
        # "variances", "weights" and "labels" [P].
        self.kept: dict[str, Tensor] = {}

    def setup(self, model: nn.Module) -> None:
        blocks = find_blocks(model, ("text",))
        model.requires_grad_(False)
        for block, norm in blocks:
            features = norm.weight.shape[0]
            layer = AdaptFormerMLP(block.mlp, features, self.width, generator=self.generator)
            layer.listen(norm)
            block.mlp = layer.train(block.mlp.training)
        # Behind the image encoder: by no path of its own.
        model.add_module("label_memory", LabelMemory(self.sharpness))

    def memory(self, model: nn.Module) -> LabelMemory:
        """The units of all classes."""
        memory = model.get_submodule("label_memory")
        assert isinstance(memory, LabelMemory)
        return memory

    @property
    def learned(self) -> int:
        """Classes of finished tasks."""
        return len(self.kept.get("texts", ()))

    @torch.no_grad()
    def begin_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        check_order(stage, self.learned)
        for layer in adapters(model, AdaptFormerMLP).values():
            layer.renew()
        centres = [kmeans(points, self.units)[0] for points in _by_class(stage)]
        self.memory(model).start(torch.cat(centres), _labels(centres, stage.offset))

    def image_loss(self, batch: EncodedBatch) -> Tensor:
        """The loss of the class's docstring, from drawn features and a batch's."""
        drawn = self._draw(batch.images)
        features = torch.cat([drawn, batch.images])
        labels = batch.labels + batch.offset
        texts = batch.texts
        if len(drawn):
            labels = torch.cat([self.kept["labels"].to(labels.device), labels])
            texts = torch.cat([self.kept["texts"].to(texts), texts])
        scores = batch.clip.logits(features, texts)
        memory = self.memory(batch.clip.model)
        scores = scores + self.strength * memory(features, len(texts), batch.processes.part)
        losses = F.cross_entropy(scores, labels, reduction="none")
        loss = losses[len(drawn) :].mean() * len(batch.texts)
        if len(drawn):
            weights = self.kept["weights"].to(losses)
            loss = loss + self.replay * (weights * losses[: len(drawn)]).sum()
        return loss / len(texts)

    def _draw(self, like: Tensor) -> Tensor:
        """Unit features [P, E], one from each component of each earlier class."""
        if not self.learned:
            return like[:0]
        means, variances = self.kept["means"], self.kept["variances"]
        noise = torch.randn(means.shape, dtype=means.dtype, generator=self.generator)
        drawn = means + noise.to(means.device) * variances.sqrt()[:, None]
        return F.normalize(drawn, dim=1).to(like)

    @torch.no_grad()
    def end_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        mixtures = [gaussian_mixture(points, self.components) for points in _by_class(stage)]
        found = {name: torch.cat([getattr(m, name) for m in mixtures]) for name in MIXTURE}
        found["labels"] = _labels([m.means for m in mixtures], stage.offset)
        found["texts"] = stage.texts()
        kept = self.kept
        # New tensors, so that a state taken before stays as it was.
        self.kept = {n: torch.cat([kept[n].to(t), t]) if kept else t for n, t in found.items()}
        self.memory(model).freeze()
        for layer in adapters(model, AdaptFormerMLP).values():
            layer.drop()

    def classifier(self, clip: Clip, prompts: Tensor) -> Classifier:
        """score_c among learned classes where the best text is one of theirs."""
        if not self.learned:
            return super().classifier(clip, prompts)
        texts = clip.encode_text(prompts)
        learned = self.learned
        texts = torch.cat([self.kept["texts"].to(texts), texts[learned:]])
        memory = self.memory(clip.model)

        def classify(images: Images) -> Tensor:
            features = images.features()
            logits = clip.logits(features, texts)
            is_learned = logits.argmax(1, keepdim=True) < learned
            added = self.strength * memory(features, learned)
            others = (0, len(texts) - learned)
            return torch.where(is_learned, logits + F.pad(added, others, value=-math.inf), logits)

        return classify

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept": dict(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = dict(state["kept"])


def _by_class(stage: ImageStage) -> list[Tensor]:
    """The unit features [N, E] of each class's training images, in the order of the classes."""
    features, labels = (torch.cat(t) for t in zip(*stage.features(READ), strict=True))
    return [features[labels == label] for label in range(stage.count)]


def _labels(parts: Sequence[Tensor], offset: int) -> Tensor:
    """The joint label of each row of the classes' tensors."""
    sizes = torch.tensor([len(part) for part in parts])
    labels = torch.arange(len(parts)).repeat_interleave(sizes) + offset
    return labels.to(parts[0].device)
