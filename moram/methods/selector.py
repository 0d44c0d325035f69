"""Which task an image belongs to, if any: one autoencoder per task. Knows no CLIP, only features.

Also the AlexNet whose features the published selector reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..draw import draw_rows

# As published: images a step, and the epochs after which the rate falls to a tenth.
BATCH, DECAY_EPOCHS, WEIGHT_DECAY = 64, 10, 1e-4
# Of a task's images, one in so many is held out to find the task's threshold.
HELD_OUT = 5


class TaskSelector:
    """The task whose autoencoder reconstructs an image's features best, or -1 if none does well.

    Task t learns z -> decoder relu(encoder z), z = (x - m) / s, by the mean squared error. Its
    error on an image is s^2 times that: the mean squared error in the units of x, which all tasks
    share. For unbounded features, m and the scalar s are the mean and the root mean square
    deviation of the task's own training features: without them the offset that all CLIP features
    have in common would have to be learned in a few hundred steps, and what a task does not learn
    then falls back to the distance from its mean. Nothing depends on the order of the tasks. With
    bounded features (in [0, 1], as published) m = 0, s = 1, and a sigmoid follows the decoder.

    An image goes to the task with the lowest error, and to none if that error is above the task's
    threshold. The published threshold, 0.06, belongs to AlexNet's features and to an autoencoder of
    a reference data set. By default a task's threshold is the `quantile` of its errors on a fifth
    of its training images that its autoencoder has not seen: on the few that it has seen it is
    far better than on new ones of the same task, which would then be turned away.

    Args:
        width: of the bottleneck.
        steps, lr: of Adam with weight decay 1e-4 on batches of 64; the rate falls to a tenth every
            10 epochs.
        threshold: one for all tasks, in the units of the errors; None = as above.
        quantile: of a task's own images, the part that is to stay below its threshold.
        bounded: whether features lie in [0, 1].
        relative: compare errors as parts of the tasks' thresholds. A task of few images, or of many
            kinds, reconstructs its own worse than others do theirs, and loses them to others
            otherwise. Not as published.
    Source: Yu et al., CVPR 2024, arXiv 2403.11549 (DDAS); Aljundi et al., CVPR 2017,
        arXiv 1611.06194 (the autoencoder gate).
    Cost: 4 T width E FLOPs an image for T tasks and E features; stores (2 width + 2) E + width + 2
        numbers a task.
    """

    width: int
    steps: int
    lr: float
    threshold: float | None
    quantile: float
    bounded: bool
    relative: bool

    def __init__(
        self,
        width: int = 100,
        steps: int = 300,
        lr: float = 0.003,
        threshold: float | None = None,
        quantile: float = 0.95,
        bounded: bool = False,
        relative: bool = False,
    ) -> None:
        check_count("selector_width", width, 1)
        check_count("selector_steps", steps, 1)
        if not 0 < lr < float("inf"):
            raise ValueError(f"selector_lr must be finite and > 0, got {lr}")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be >= 0 or None, got {threshold}")
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {quantile}")
        self.width, self.steps, self.lr = width, steps, lr
        self.threshold, self.quantile, self.bounded = threshold, quantile, bounded
        self.relative = relative
        self.tasks: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.tasks)

    def learn(self, features: Tensor, generator: torch.Generator) -> None:
        """Add a task.

        Args:
            features: of its training images [N, E], N >= 1.
            generator: on the CPU, for the initial weights, the order and what is held out. Drawn
                from in the same way whatever the device.
        """
        order = torch.randperm(len(features), generator=generator).to(features.device)
        count = max(1, len(features) // HELD_OUT)
        held, seen = features[order[:count]], features[order[count:]]
        # A single image has to serve for both.
        seen = seen if len(seen) else held
        task = self._fit(seen, generator)
        task["threshold"] = self._errors(task, held).quantile(self.quantile)
        self.tasks.append(task)

    def _fit(self, features: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of a new task's autoencoder."""
        size = features.shape[1]
        mean, spread = features.new_zeros(size), features.new_ones(())
        if not self.bounded:
            mean = features.mean(0)
            spread = (features - mean).square().mean().sqrt().clamp_min(1e-12)
        weights = {
            "encoder": draw_rows((self.width, size), features, generator),
            "encoder_bias": features.new_zeros(self.width),
            "decoder": draw_rows((size, self.width), features, generator),
            "decoder_bias": features.new_zeros(size),
        }
        task = {"mean": mean, "spread": spread, **weights}
        for tensor in weights.values():
            tensor.requires_grad_(True)
        adam = torch.optim.Adam(weights.values(), lr=self.lr, weight_decay=WEIGHT_DECAY)
        per_epoch = -(-len(features) // BATCH)
        for step in range(self.steps):
            epoch, place = divmod(step, per_epoch)
            if not place:
                order = torch.randperm(len(features), generator=generator).to(features.device)
            adam.param_groups[0]["lr"] = self.lr * 0.1 ** (epoch // DECAY_EPOCHS)
            rows = features[order[place * BATCH :][:BATCH]]
            with torch.enable_grad():
                loss = self._errors(task, rows).mean() / spread.square()
                grads = torch.autograd.grad(loss, list(weights.values()))
            for tensor, grad in zip(weights.values(), grads, strict=True):
                tensor.grad = grad
            adam.step()
        return {name: tensor.detach() for name, tensor in task.items()}

    def _errors(self, task: Mapping[str, Tensor], features: Tensor) -> Tensor:
        inputs = (features - task["mean"]) / task["spread"]
        hidden = F.relu(F.linear(inputs, task["encoder"], task["encoder_bias"]))
        output = F.linear(hidden, task["decoder"], task["decoder_bias"])
        output = output.sigmoid() if self.bounded else output
        return (inputs - output).square().mean(1) * task["spread"].square()

    @torch.no_grad()
    def errors(self, features: Tensor) -> Tensor:
        """Every task's error on every image, [B, T] of features [B, E]."""
        found = [
            self._errors({name: t.to(features) for name, t in task.items()}, features)
            for task in self.tasks
        ]
        return torch.stack(found, 1) if found else features.new_empty(len(features), 0)

    def select(self, features: Tensor, whole_batch: bool = False) -> Tensor:
        """Task indices [B] of features [B, E]; -1 = none.

        Args:
            whole_batch: choose one task for all images, by their mean errors, as the authors' code
                does. Where a batch holds images of one domain alone, that tells the domain.
        """
        errors = self.errors(features)
        if not len(self):
            return torch.full((len(features),), -1, device=features.device)
        if whole_batch:
            errors = errors.mean(0, keepdim=True).expand_as(errors)
        # Loaded tasks may still lie on the CPU.
        limits = torch.stack([task["threshold"].to(errors) for task in self.tasks])
        if self.threshold is not None:
            limits = torch.full_like(limits, self.threshold)
        chosen = (errors / limits if self.relative else errors).argmin(1)
        lowest = errors.gather(1, chosen[:, None])[:, 0]
        return chosen.masked_fill(lowest > limits[chosen], -1)

    def state_dict(self) -> dict[str, Any]:
        """The tensors of every task."""
        return {"tasks": [dict(task) for task in self.tasks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.tasks = [dict(task) for task in state["tasks"]]


def load_alexnet(file: str | Path) -> nn.Module:
    """AlexNet's last convolution before its ReLU, as a frozen module.

    From [B, 3, 224, 224] to [B, 256, 13, 13]. Built here, so torchvision is not needed.

    Args:
        file: torchvision's weights of `alexnet`, whole or the part "features." alone.
    Raises:
        ValueError: the file holds other weights. OSError: it cannot be read.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
    )
    state = torch.load(file, map_location="cpu", weights_only=True)
    prefix = "features."
    state = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"alexnet must be torchvision's weights of AlexNet: {error}") from error
    return net.requires_grad_(False).eval()
