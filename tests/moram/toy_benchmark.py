"""A third benchmark: points in the plane, told apart by a small MLP. No images, no texts, no tests.

All that a benchmark must give the harness, and nothing else: settings, a plan, a run, a report.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moram.continual import metrics
from moram.harness.plan import StreamPlan
from moram.harness.report import Report
from moram.harness.run import Run
from moram.harness.settings import StreamSettings
from moram.harness.values import setting
from moram.methods.train import Stage

WIDTH, CLASSES = 16, 2


@dataclass(frozen=True)
class ToySettings(StreamSettings):
    """tasks: names; each turns the border between the classes in its own way. points: a task."""

    presets: ClassVar[dict] = {
        "paper": {
            "*": {"lr": 0.05, "dropout": 0.1},
            "moram": {"method_args": {"value_scale": 8.0, "temperature": 0.3}},
        }
    }

    tasks: tuple = setting(("north", "east", "south"), same_row=True)
    data: str = setting("drawn", same_row=True)
    model: str = "mlp"
    targets: str | tuple = ("up", "down")
    epochs: int = 3
    batch_size: int = 8
    points: int = 32
    threads: int | None = setting(1)


class Points(NamedTuple):
    """inputs [N, 2], labels [N]."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def num_labels(self, rows):
        return len(rows)


class ToyTask(NamedTuple):
    name: str
    train: Points
    test: Points


class ToyPlan(StreamPlan):
    def read(self, log):
        return [
            ToyTask(name, *(self._draw(name, s) for s in (0, 1))) for name in self.settings.tasks
        ]

    def _draw(self, name, split):
        angle = sum(map(ord, name))
        generator = torch.Generator().manual_seed(2 * angle + split)
        inputs = torch.randn(self.settings.points, 2, generator=generator)
        border = torch.tensor([torch.tensor(angle).cos(), torch.tensor(angle).sin()])
        # Constant third input: the angle, by which the tasks can be told apart.
        inputs = torch.cat([inputs, torch.full((len(inputs), 1), angle % 5 - 2.0)], 1)
        return Points(inputs, (inputs[:, :2] @ border > 0).long())

    @property
    def fingerprint(self):
        return hashlib.sha256(
            repr([task.train.inputs for task in self.stream]).encode()
        ).hexdigest()


class ToyReport(Report):
    format = "toy"
    command = "the toy"
    settings = ToySettings
    summary: ClassVar[dict] = {
        "last": ("Last", metrics.overall_performance),
        "forgetting": ("Forgetting", metrics.forgetting),
    }

    def notes(self, runs):
        return "Percent of the points."


class ToyRun(Run):
    report = ToyReport()

    def make_plan(self):
        return ToyPlan(self.settings, self.log)

    def load(self):
        torch.manual_seed(0)
        layers = {"up": nn.Linear(3, WIDTH), "act": nn.Tanh(), "down": nn.Linear(WIDTH, CLASSES)}
        self.model = nn.Sequential()
        for name, layer in layers.items():
            self.model.add_module(name, layer)
        self.model.to(self.device).eval()

    def stage(self, members):
        parts = [self.stream[i].train for i in members]
        data = Points(*(torch.cat(tensors).to(self.device) for tensors in zip(*parts, strict=True)))
        return Stage(self.model, data, self.plan.train_settings(members), cross_entropy)

    @torch.no_grad()
    def score_task(self, number, i):
        points = self.stream[i].test
        found = self.model(points.inputs.to(self.device)).argmax(1).cpu()
        self.progress.answered(len(points))
        score = 100 * found.eq(points.labels).double().mean().item()
        return {"eval": {"score": score}, "results": found.tolist()}


def cross_entropy(model, data, rows, per_example=False):
    """As `moram.methods.train.summed_loss`."""
    loss = F.cross_entropy(model(data.inputs[rows]), data.labels[rows], reduction="sum")
    return loss, len(rows), len(rows)


def run_toy(settings, log=print, stop=lambda: False):
    """A run of the third benchmark."""
    return ToyRun(settings, log, stop).execute()
