"""What X-TAIL trains on: the contrastive loss of a task's images and the prompts of its classes."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.base import EncodedBatch
from ..methods.train import Stage, TrainSettings
from ..models.clip import Clip
from ..processes import Processes
from .images import ImageRows

ALONE = Processes(together=False)
OwnLoss = Callable[[EncodedBatch], Tensor | None]


def contrastive(
    model: nn.Module,
    data: ImageRows,
    rows: Tensor,
    per_example: bool = False,
    processes: Processes = ALONE,
    own_loss: OwnLoss = lambda batch: None,
) -> tuple[Tensor, int, int]:
    """The published loss of a batch, without the features of earlier tasks' prompts.

    With V [B, E] the images, T [C, E] the prompts of this task's classes, s the scale and M the
    number of classes of earlier tasks:

        image loss = cross-entropy of softmax(s V T^T) over the C classes
        text loss = -1 / (M + C) sum_j log softmax over the batch of s T V^T at [y_j, j]

    In the published form the prompts of earlier tasks are part of both: masked with -inf in the
    first, and rows without a target in the second, which only count in the divisor.

    Args:
        model: the model, whose parameters are trained. data: of the task. rows: of the batch.
        per_example: not used; the loss is one of the whole batch.
        processes: share the images out; losses and gradients of all add up to those of one.
        own_loss: a method's `image_loss`, which takes the place of this loss where it gives one.
    Returns:
        (loss, 1, images of this process).
    Source: Lu et al., ICML 2026, arXiv 2506.21035 (the X-TAIL runs).
    """
    clip = data.clip
    share = slice(processes.rank, None, processes.world)
    count = len(rows[share])
    with processes.drawing_alike():
        pixels = data.pixels(rows, share) if count else None
    images = None if pixels is None else clip.encode_image(pixels)
    texts = processes.part(data.texts())
    images = processes.whole(texts[:0].detach() if images is None else images, len(rows))
    labels = data.labels[rows].to(images.device)
    loss = own_loss(EncodedBatch(clip, images, texts, labels, data.offset, processes))
    if loss is None:
        logits = clip.logits(images, texts)
        loss = F.cross_entropy(logits, labels, label_smoothing=data.label_smoothing)
        if data.text_loss:
            over_batch = logits.T.log_softmax(1)
            own = over_batch[labels, torch.arange(len(labels), device=labels.device)]
            loss = loss - own.sum() / (data.offset + data.count)
    return loss - loss.detach() * (1 - 1 / processes.world), 1, count


class ImageStage(Stage):
    """A task's training images, for hooks that pass over them once more.

    offset: classes of earlier tasks. count: classes of this one. clip: the model as a `Clip`.

    Args:
        model: the model. data, settings: of the task. seed: of the crops.
        own_loss: see `contrastive`.
    """

    data: ImageRows
    clip: Clip
    offset: int
    count: int
    seed: int

    def __init__(
        self,
        model: nn.Module,
        data: ImageRows,
        settings: TrainSettings,
        seed: int,
        own_loss: OwnLoss = lambda batch: None,
    ) -> None:
        super().__init__(model, data, settings, partial(contrastive, own_loss=own_loss))
        self.clip, self.offset, self.count, self.seed = data.clip, data.offset, data.count, seed

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (pixels [B, 3, S, S], labels [B] from 0) of all images, in a fixed order.

        The crops are the same at every call, whatever else draws random numbers.
        """
        for number, rows in enumerate(torch.arange(len(self.data)).split(size)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.seed * 1_000_003 + number) % 2**63)
                pixels = self.data.pixels(rows)
            yield pixels, self.data.labels[rows].to(pixels.device)

    @torch.no_grad()
    def features(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (unit features [B, E], labels [B] from 0) of all images, in a fixed order."""
        was_training = self.model.training
        self.model.eval()
        for pixels, labels in self.batches(size):
            yield self.clip.encode_image(pixels), labels
        self.model.train(was_training)

    @torch.no_grad()
    def texts(self) -> Tensor:
        """Unit features [C, E] of the prompts of its classes, as the model is."""
        return self.data.texts()

    def rows(self, count: int) -> Tensor:
        """So many images, evenly spaced: they are sorted by class."""
        return torch.arange(count) * len(self.data) // max(1, count)

    def losses(
        self, limit: int | None = None, size: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """As `Stage.losses`; the crops are the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield from super().losses(limit, size)
