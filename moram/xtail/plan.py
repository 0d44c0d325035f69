"""What a run over image domains will do: its datasets, few shots and images left out."""

import hashlib
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness.plan import StreamPlan
from ..harness.progress import Log
from ..harness.settings import StreamSettings
from ..methods.train import TrainSettings
from .data.datasets import load_domains, offsets, shared_names
from .data.domains import (
    ArraySplit,
    Domain,
    FileSplit,
    Split,
    check_covered,
    empty_classes,
    few_shot,
    origin,
    take,
)
from .data.folders import describe_passed_over
from .data.small import is_small, load_small
from .settings import XtailSettings


class XtailPlan(StreamPlan):
    """`StreamPlan` of `XtailSettings`.

    stream: the train split of each is cut to its few shots. offsets: the first label of each in the
    joint label space.
    """

    settings: XtailSettings
    stream: list[Domain]
    offsets: list[int]

    def read(self, log: Log) -> list[Domain]:
        whole = read_domains(self.settings)
        for domain in whole:
            if domain.passed_over:
                log(describe_passed_over(domain))
        stream = [self._cut(domain, log) for domain in whole]
        self.offsets = offsets(stream)
        for prompt, first, second in shared_names(stream):
            log(f"{first} and {second} both have the prompt {prompt!r}: ties go to {first}")
        return stream

    @classmethod
    def arguments(cls, settings: StreamSettings) -> dict[str, Any]:
        # The published layers have no scale.
        return super().arguments(settings) | {"alpha": settings.rank}

    def _cut(self, domain: Domain, log: Log) -> Domain:
        """A domain with its few training images, and its test images up to the limit."""
        shots = few_shot(domain, self.settings.shots, self.settings.seed)
        if shots.short:
            log(
                f"{domain.name}: {len(shots.short)} classes have fewer than "
                f"{self.settings.shots} training images, the fewest {min(shots.short.values())}; "
                "theirs are repeated"
            )
        test, limit = domain.test, self.settings.eval_limit
        if self.settings.held_out:
            drawn = set(shots.indices)
            test = take(domain.train, [i for i in range(len(domain.train)) if i not in drawn])
            if not len(test):
                raise ValueError(
                    f"{domain.name} has no more training images than are drawn: held_out has none"
                )
        if limit is not None and limit < len(test):
            test = take(test, [i * len(test) // limit for i in range(limit)])
        return domain._replace(train=take(domain.train, shots.indices), test=test)

    def train_settings(self, members: Sequence[int]) -> TrainSettings:
        """How a stage is trained; several datasets at once take the steps of all of them."""
        found = self.settings.train_settings(self.stream[members[0]].name)
        return replace(found, iterations=len(members) * self.settings.iterations)

    @property
    def fingerprint(self) -> str:
        """What tells this run's images from others: names, classes, labels, files and sizes."""
        listed = [
            (d.name, d.classes, d.template, [(s.labels, _contents(s)) for s in (d.train, d.test)])
            for d in self.stream
        ]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def leave_out(
        self, bad: Iterable[tuple[Collection[int], Collection[int]]], trained: bool
    ) -> None:
        """Go on without some images.

        Args:
            bad: for each dataset, (test, train): the rows to leave out. trained: whether training
            images are needed.
        Raises:
            ValueError: a class has no training image left, or a dataset no test image.
        """
        for place, (domain, rows) in enumerate(zip(self.stream, bad, strict=True)):
            if not any(rows):
                continue
            test, train = (
                take(split, [row for row in range(len(split)) if row not in found])
                for split, found in zip((domain.test, domain.train), rows, strict=True)
            )
            lost = empty_classes(domain, train)
            if trained and lost:
                raise ValueError(f"{domain.name} has no image left of {', '.join(lost)}")
            if not len(test):
                raise ValueError(f"{domain.name} has no test image left")
            self.stream[place] = domain._replace(test=test, train=train)

    @property
    def unscored(self) -> dict[str, list[str]]:
        """The classes without a test image, by dataset, where there are any.

        Data have none. A limit, held-out images and images that are left out may make some.
        """
        empty = {domain.name: empty_classes(domain, domain.test) for domain in self.stream}
        return {name: classes for name, classes in empty.items() if classes}

    @property
    def prompts(self) -> list[str]:
        """The prompts of all classes of all datasets."""
        return [prompt for domain in self.stream for prompt in domain.prompts]


def read_domains(settings: XtailSettings) -> list[Domain]:
    """The datasets of a run, whole.

    Raises:
        ValueError, OSError: see `load_domains` and `load_small`.
    """
    others = [name for name in settings.datasets if not is_small(name)]
    if others and not settings.data_dir:
        raise ValueError(
            f"--data (data_dir) must be given: it holds {', '.join(others)}; --preset small "
            "needs none"
        )
    found = {}
    if others:
        found = {d.name: d for d in load_domains(others, settings.data_dir, settings.spaces)}
    for name in settings.datasets:
        if is_small(name):
            folder = Path(settings.data_dir or ".") / name
            if settings.data_dir and (folder / "train").is_dir():
                raise ValueError(f"{name} is a domain of its own: give {folder} another name")
            found[name] = load_small(name, settings.data_dir or None)
            check_covered(found[name])
    return [found[name] for name in settings.datasets]


def _contents(split: Split) -> list[Any]:
    """What tells the images of a split from others: names and sizes of files, or checksums."""
    found = []
    for i in range(len(split)):
        base, row = origin(split, i)
        if isinstance(base, FileSplit):
            found.append((base.paths[row], os.path.getsize(base.paths[row])))
        else:
            assert isinstance(base, ArraySplit)
            found.append(zlib.crc32(base.images[row].tobytes()))
    return found
