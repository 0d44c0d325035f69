"""The one loop that trains them all: one task, step by step, with a method's hooks."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..continual.scoring import IGNORED, answer_logits
from ..processes import Processes
from .base import Method, Step

SCHEDULES = ("linear", "constant", "cosine")
AVERAGES = ("token", "example")
# From a model, data, rows and maybe per_example to what `summed_loss` returns.
Objective = Callable[..., tuple[Tensor, int, int]]


class Data(Protocol):
    """A task's training examples, besides what the objective reads of them."""

    def __len__(self) -> int: ...

    def num_labels(self, rows: Tensor) -> int: ...


class TokenData(Data, Protocol):
    """What `summed_loss` reads: token ids, mask and labels, each [B, L], of some examples."""

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainSettings:
    """How each task is trained, the same for every method but for the rate.

    Args:
        lr: peak learning rate of AdamW; the optimiser is new for each task.
        epochs: passes over a task's data.
        batch_size: examples a step, over all processes together.
        clip: gradient norm is clipped to this; None = it is not.
        seed: of the order of the data, and of dropout.
        micro_batch: examples that go through the model at once; None = batch_size. Changes memory,
            not results, up to rounding; but with dropout other inputs are dropped.
        schedule: "linear": a warm-up over a tenth of the steps, then a linear decay to zero;
            "constant"; "cosine": from the peak to zero along half a cosine.
        betas: of AdamW. No weight decay.
        average: the loss of a step is the mean over its answer "token"s, or over its "example"s
            (each the mean over its own tokens).
        drop_last: whether an epoch's incomplete last batch is dropped.
        warmup: steps in which "cosine" first climbs to the peak.
        iterations: steps of a task, whatever its size; None = as many as epochs has.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 8
    clip: float | None = 1.0
    seed: int = 0
    micro_batch: int | None = None
    schedule: str = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    average: str = "token"
    drop_last: bool = True
    warmup: int = 0
    iterations: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        check_count("warmup", self.warmup, 0)
        for name in ("micro_batch", "iterations"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (name == "clip" and value is None) and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name, allowed in (("schedule", SCHEDULES), ("average", AVERAGES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    def per_epoch(self, examples: int) -> int:
        """Optimiser steps of one epoch over that many examples."""
        whole, rest = divmod(examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def steps(self, examples: int) -> int:
        """Optimiser steps for a task of that many examples."""
        per_epoch = self.per_epoch(examples)
        if self.iterations is not None:
            return self.iterations if per_epoch else 0
        return self.epochs * per_epoch


class Stage:
    """A task's training data, for hooks that pass over it once more.

    Args:
        data: `TokenData` for the default objective. objective: as `summed_loss`.
    """

    model: nn.Module
    data: Data
    settings: TrainSettings

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainSettings,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.objective: Objective = summed_loss if objective is None else objective

    def losses(
        self, limit: int | None = None, size: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield (mean cross-entropy over a batch's answer tokens, examples) without shuffling.

        Dropout is off. The graph of each loss is the caller's to use; under `torch.no_grad` it is
        a plain forward pass.

        Args:
            limit: examples at most; None = all.
            size: examples at once; None = as in training.
        """
        count = len(self.data) if limit is None else min(limit, len(self.data))
        size = size or self.settings.micro_batch or self.settings.batch_size
        was_training = self.model.training
        self.model.eval()
        for rows in self.rows(count).split(size):
            loss, tokens, _ = self.objective(self.model, self.data, rows)
            yield loss / max(1, tokens), len(rows)
        self.model.train(was_training)

    def pass_over(self, limit: int | None = None) -> None:
        """Run the model on what `losses` passes over, for what hooks on its modules see."""
        for _ in self.losses(limit):
            pass

    def rows(self, count: int) -> Tensor:
        """Which examples `losses` passes over, if it is to be so many: the first."""
        return torch.arange(count)


class TaskTrainer:
    """Trains the trainable parameters of a model on one task; can stop and go on at any step.

    Args:
        model, method: the method's `begin_task` was called.
        data: `TokenData` for the default objective. Where `joint` is true, a batch has one loss
            that is no sum over its rows: the objective gets whole batches and `processes`, among
            which it shares the rows out itself.
        settings: of the task.
        index: the task's place in the stream.
        processes: None = this one alone.
        objective: as `summed_loss`, the default.
    Raises:
        ValueError: there are not enough examples for a step, or nothing to train.
    """

    model: nn.Module
    method: Method
    data: Data
    settings: TrainSettings
    processes: Processes
    parameters: list[nn.Parameter]
    done: int
    total: int
    optimizer: torch.optim.AdamW

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: Data,
        settings: TrainSettings,
        index: int,
        processes: Processes | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.method, self.data, self.settings = model, method, data, settings
        self.index = index
        self.joint: bool = getattr(data, "joint", False)
        self.objective: Objective = summed_loss if objective is None else objective
        self.processes = Processes() if processes is None else processes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"{method.name or 'the method'} left no parameter to train")
        self.done, self.total = 0, settings.steps(len(data))
        if self.total == 0:
            raise ValueError(
                f"a task needs at least batch_size={settings.batch_size} training examples, "
                f"got {len(data)}"
            )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=settings.betas, weight_decay=0.0
        )

    def run(
        self, on_step: Callable[["TaskTrainer", float], object] = lambda trainer, loss: None
    ) -> None:
        """Train to the end of the task.

        Args:
            on_step: called after each step with this trainer and the step's cross-entropy.
        """
        self.model.train()
        while self.done < self.total:
            loss = self._step()
            self.done += 1
            on_step(self, loss)
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, besides the model's and the method's own state."""
        return {"done": self.done, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])

    def rows(self, number: int) -> Tensor:
        """The examples of a step; every epoch has an order of its own."""
        settings, per_epoch = self.settings, self.settings.per_epoch(len(self.data))
        epoch, place = divmod(number, per_epoch)
        seed = (settings.seed * 1000 + self.index) * 1000 + epoch
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))
        return order[place * settings.batch_size :][: settings.batch_size]

    def _step(self) -> float:
        settings, rows = self.settings, self.rows(self.done)
        # Seeded by the step alone, so that a run that goes on draws the same dropout.
        seed = (settings.seed * 1000 + self.index) * 1_000_003 + self.done
        torch.manual_seed((seed * 1009 + self.processes.rank) % 2**63)
        per_example = settings.average == "example"
        total = len(rows) if per_example else self.data.num_labels(rows)
        loss = self.parameters[0].new_zeros((), dtype=torch.float32)
        for part in self._parts(rows):
            if part is None:
                # A sharded base needs as many passes in every process: this one counts nothing.
                (self._objective(rows[:1])[0] * 0).backward()
                continue
            summed, _, examples = self._objective(part, per_example)
            share = summed / max(1, total)
            loss += share.detach()
            extra = self.method.auxiliary(self.model)
            if extra is not None:
                share = share + extra * (examples / len(rows))
            share.backward()
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.processes.sum(gradients)
        self.processes.sum([loss])
        per_epoch = settings.per_epoch(len(self.data))
        step = Step(self.index, self.done, self.total, per_epoch, loss)
        extra = self.method.penalty(self.model, step)
        if extra is not None:
            extra.backward()
        self.method.before_step(self.model, step)
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * self._rate(self.done)
        self.optimizer.step()
        self.method.after_step(self.model, step)
        self.optimizer.zero_grad()
        return loss.item()

    def _objective(self, rows: Tensor, per_example: bool = False) -> tuple[Tensor, int, int]:
        more = {"processes": self.processes} if self.joint else {}
        return self.objective(self.model, self.data, rows, per_example, **more)

    def _parts(self, rows: Tensor) -> list[Tensor | None]:
        """This process's micro-batches of a step; None is a pass for the other processes' sake."""
        if self.joint:
            return [rows]
        size = self.settings.micro_batch or len(rows)
        mine = self.processes.share(rows)
        parts: list[Tensor | None] = list(mine.split(size)) if len(mine) else []
        if getattr(self.model, "is_sharded", False):
            most = -(-len(rows) // self.processes.world)
            parts += [None] * (-(-most // size) - len(parts))
        return parts

    def _rate(self, number: int) -> float:
        """The rate of a step as a part of the peak."""
        if self.settings.schedule == "constant":
            return 1.0
        if self.settings.schedule == "cosine":
            climb = min(self.settings.warmup, self.total)
            if number < climb:
                return (number + 1) / climb
            part = (number - climb) / max(1, self.total - climb)
            return 0.5 * (1 + math.cos(math.pi * part))
        warmup = max(1, self.total // 10)
        return min((number + 1) / warmup, (self.total - number) / max(1, self.total - warmup))


def summed_loss(
    model: nn.Module, data: TokenData, rows: Tensor, per_example: bool = False
) -> tuple[Tensor, int, int]:
    """Cross-entropy summed over the answer tokens of some examples.

    Args:
        per_example: if true, each example counts with the mean over its own tokens.
    Returns:
        (sum with graph, answer tokens, examples).
    """
    device = next(model.parameters()).device
    ids, mask, labels = (t.to(device) for t in data.batch(rows))
    labels = labels[:, labels.ne(IGNORED).any(0).int().argmax() :]
    logits = answer_logits(model, ids, mask, labels.shape[1])
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    ).view(labels.shape)
    counts = labels.ne(IGNORED).sum(1)
    if per_example:
        losses = losses.sum(1) / counts.clamp_min(1)
    return losses.sum(), int(counts.sum()), len(rows)
