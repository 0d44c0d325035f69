"""What a run will do: its datasets, method and stages, checked without a model."""

import hashlib
import os
import zlib
from pathlib import Path

from ..methods.registry import accepted_arguments, make_method
from .datasets import load_domains, offsets, shared_names
from .domains import FileSplit, check_covered, empty_classes, few_shot, origin, take
from .folders import describe_passed_over
from .small import is_small, load_small


class Plan:
    """Everything about a run that follows from its settings and its data.

    stream: `Domain`s, the train split of each cut to its few shots. offsets: the first label of
    each in the joint label space.

    Args:
        settings: `XtailSettings`. log: called with lines of text.
    Raises:
        ValueError, OSError: bad data, or settings that do not fit it or the method.
    """

    def __init__(self, settings, log=print):
        self.settings = settings
        self.method = build_method(settings)
        whole = read_domains(settings)
        for domain in whole:
            if domain.passed_over:
                log(describe_passed_over(domain))
        self.stream = [self._cut(domain, log) for domain in whole]
        self.offsets = offsets(self.stream)
        for prompt, first, second in shared_names(self.stream):
            log(f"{first} and {second} both have the prompt {prompt!r}: ties go to {first}")
        self.source = settings.data_dir or "the drawn domains"
        self.stages = self.method.stages(len(self.stream))
        # Where nothing is trained, the one row of R is the untrained model's.
        self.has_untrained = settings.untrained and any(self.stages)

    def _cut(self, domain, log):
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

    @property
    def fingerprint(self):
        """What tells this run's images from others: names, classes, labels, files and sizes."""
        listed = [
            (d.name, d.classes, d.template, [(s.labels, _contents(s)) for s in (d.train, d.test)])
            for d in self.stream
        ]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def leave_out(self, bad, trained):
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
    def unscored(self):
        """The classes without a test image, by dataset, where there are any.

        Data have none. A limit, held-out images and images that are left out may make some.
        """
        empty = {domain.name: empty_classes(domain, domain.test) for domain in self.stream}
        return {name: classes for name, classes in empty.items() if classes}

    @property
    def prompts(self):
        """The prompts of all classes of all datasets."""
        return [prompt for domain in self.stream for prompt in domain.prompts]

    def examples(self, members):
        """Examples that training a stage goes through."""
        if not members:
            return 0
        if self.method.has_steps:
            return self.settings.iterations * self.settings.batch_size
        return sum(len(self.stream[i].train) for i in members)

    def scored(self, number):
        """The tasks that are scored after a stage: all, also those to come."""
        return range(len(self.stream))

    def work(self):
        """Examples to train on and to answer, all in all."""
        tests = sum(len(domain.test) for domain in self.stream)
        rows = len(self.stages) + self.has_untrained
        return sum(map(self.examples, self.stages)) + rows * tests


def build_method(settings):
    """The method of a run.

    Raises:
        ValueError: there is no such method or argument, or it does not fit X-TAIL.
    """
    common = {"targets": settings.targets, "exclude": settings.exclude}
    common |= {"rank": settings.rank, "dropout": settings.dropout, "seed": settings.seed}
    # The published layers have no scale.
    common["alpha"] = settings.rank
    accepted = accepted_arguments(settings.method)
    common = {name: value for name, value in common.items() if name in accepted}
    method = make_method(settings.method, **(common | settings.method_args))
    if method.needs == "language":
        raise ValueError(f"{settings.method} is for language models")
    if method.needs_task_id:
        raise ValueError(f"{settings.method} must be told the task, which X-TAIL does not do")
    return method


def read_domains(settings):
    """The datasets of a run, whole.

    Raises:
        ValueError, OSError: see `load_domains` and `load_small`.
    """
    others = [name for name in settings.datasets if not is_small(name)]
    if others and not settings.data_dir:
        raise ValueError(
            f"--data-dir (data_dir) must be given: it holds {', '.join(others)}; --preset small "
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


def _contents(split):
    """What tells the images of a split from others: names and sizes of files, or checksums."""
    found = []
    for i in range(len(split)):
        base, row = origin(split, i)
        if isinstance(base, FileSplit):
            found.append((base.paths[row], os.path.getsize(base.paths[row])))
        else:
            found.append(zlib.crc32(base.images[row].tobytes()))
    return found
