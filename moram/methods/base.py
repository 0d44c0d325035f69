"""The hooks of a method and the one loop that trains them all."""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..config import check_count
from ..continual.metrics import majority_accuracy
from ..continual.scoring import IGNORED, answer_logits, encode, exact_match, predict


@dataclass(frozen=True)
class TrainSettings:
    """How each task is trained, the same for every method but for the rate.

    Args:
        lr: peak learning rate of AdamW; a linear warm-up over a tenth of the steps, then a linear
            decay to zero. The optimiser is new for each task.
        epochs: passes over a task's data.
        batch_size: examples a step; an incomplete last batch is dropped.
        max_length: tokens of prompt and answer at most.
        clip: gradient norm is clipped to this.
        seed: of the order of the data.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 8
    max_length: int = 192
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "max_length"):
            check_count(name, getattr(self, name), 1)
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")

    def steps(self, examples):
        """Optimiser steps for a task of that many examples."""
        return self.epochs * (examples // self.batch_size)


class Method:
    """What a method does around the tasks; subclasses override the hooks they need."""

    name = ""

    def setup(self, model):
        """Prepare the model, once."""

    def begin_task(self, model, index):
        """Called before training task `index`; the trainable parameters are read after it."""

    def end_task(self, model, index):
        """Called after training task `index`."""


@dataclass
class StreamResult:
    """What a run over a stream gave.

    matrix: R[t][i], accuracy in percent on task i after training task t; untrained: the row before
    any training; majority: what the most frequent answer scores; trained: parameters per task;
    seconds: training time per task; losses: one list a task; predictions: after the last task.
    """

    matrix: list = field(default_factory=list)
    untrained: list = field(default_factory=list)
    majority: list = field(default_factory=list)
    trained: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    predictions: list = field(default_factory=list)


def run_stream(model, tokenizer, stream, method, settings, step=lambda count: None, untrained=None):
    """Learn the tasks one after the other and score all of them after each.

    Args:
        model: a causal language model; changed in place.
        stream: list of `Task`.
        method: a `Method`.
        settings: `TrainSettings`.
        step: called with the number of examples done, for a progress bar; see `num_examples`.
        untrained: scores of the untouched model, if known already.
    Returns:
        `StreamResult`.
    """
    data = encode_stream(tokenizer, stream, settings)
    result = StreamResult(majority=[majority_accuracy(task.test) for task in stream])
    result.untrained = untrained or score(model, data, settings, step)[0]
    method.setup(model)
    for index, (train, _) in enumerate(data):
        method.begin_task(model, index)
        parameters = [p for p in model.parameters() if p.requires_grad]
        result.trained.append(sum(p.numel() for p in parameters))
        start = time.perf_counter()
        result.losses.append(train_task(model, parameters, train, settings, index, step))
        result.seconds.append(time.perf_counter() - start)
        method.end_task(model, index)
        row, result.predictions = score(model, data, settings, step)
        result.matrix.append(row)
    return result


def encode_stream(tokenizer, stream, settings):
    """The (train, test) parts of every task as `Encoded`."""
    return [
        tuple(encode(tokenizer, part, settings.max_length) for part in (task.train, task.test))
        for task in stream
    ]


def num_examples(stream, settings, untrained=True):
    """How many examples `run_stream` reports through `step`."""
    tests = sum(len(task.test) for task in stream)
    trains = sum(settings.steps(len(task.train)) * settings.batch_size for task in stream)
    return trains + tests * (len(stream) + untrained)


def score(model, data, settings, step=lambda count: None):
    """Accuracy in percent on every task's test part, and the predictions."""
    predictions = [predict(model, test, settings.batch_size, step) for _, test in data]
    pairs = zip(predictions, data, strict=True)
    return [exact_match(found, test) for found, (_, test) in pairs], predictions


def train_task(model, parameters, data, settings, index, step=lambda count: None):
    """Train the parameters on one task. Returns the loss of every step."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + index)
    count, size = len(data.input_ids), settings.batch_size
    total = settings.steps(count)
    if total == 0:
        raise ValueError(f"a task needs at least batch_size={size} training examples, got {count}")
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    warmup = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (total - i) / max(1, total - warmup))
    )
    losses = []
    model.train()
    for _ in range(settings.epochs):
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % size].split(size):
            ids, mask = data.input_ids[rows].to(device), data.attention_mask[rows].to(device)
            labels = data.labels[rows, -data.tail :].to(device)
            logits = answer_logits(model, ids, mask, data.tail)
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step(size)
    model.eval()
    return losses
