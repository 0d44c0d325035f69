"""The hooks of a method: what it does around and inside the training of each task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ..inject import adapters
from ..layers import Adapter

if TYPE_CHECKING:
    from ..continual.data import Task
    from ..models.clip import Clip
    from ..processes import Processes
    from .train import Stage

# What `Method.needs` may be, and what messages call it.
MODELS = {"language": "language models", "clip": "CLIP models"}


class Step(NamedTuple):
    """One optimiser step, as hooks see it.

    index: the task's place in the stream. number: steps done before this one in this task; total:
    steps of the task. per_epoch: steps of one epoch. loss: cross-entropy of the whole effective
    batch, a detached scalar, the same in every process.
    """

    index: int
    number: int
    total: int
    per_epoch: int
    loss: Tensor


class Images(Protocol):
    """A batch of images to classify."""

    def pixels(self) -> Tensor:
        """Normalised images [B, 3, H, W]."""
        ...

    def features(self) -> Tensor:
        """Their unit features [B, E], kept by the caller for methods with has_frozen_features."""
        ...


# From images to a score for each class [B, C].
Classifier = Callable[[Images], Tensor]


class EncodedBatch(NamedTuple):
    """A training batch, encoded, as a method's own loss reads it.

    images: unit features [B, E] of the whole batch; those of other processes have no graph. texts:
    unit features [C, E] of the prompts of the task's classes. labels: [B], in 0..C-1. offset:
    classes of earlier tasks. processes: among which the batch is shared; what all of them compute
    alike goes through its `part` once.
    """

    clip: Clip
    images: Tensor
    texts: Tensor
    labels: Tensor
    offset: int
    processes: Processes


class ImageStage(Protocol):
    """What methods for CLIP read of a stage: `moram.xtail.objective.ImageStage`."""

    clip: Clip
    offset: int
    count: int

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def features(self, size: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def texts(self) -> Tensor: ...


class Method:
    """What a method does with a model and a stream of tasks; subclasses override what they need.

    Every hook gets the whole model. A method keeps what it must remember between tasks in its own
    attributes (and names it in `state_dict`) or in its adapters, whose tensors are saved anyway.
    """

    name: str = ""
    # Whether the model must be told, at inference, which task an input belongs to. An instance says
    # so where an argument asks for it.
    needs_task_id: bool = False
    # A key of MODELS where a method is for such models alone.
    needs: str | None = None
    # Whether tasks are trained step by step, or learned in `end_task` alone.
    has_steps = True
    # Whether no method hook ever changes what the model computes from an image.
    has_frozen_features = False
    # Settings of a run that change no result of other methods, but do change this one's.
    tied: frozenset[str] = frozenset()
    # What a method draws from, where it draws.
    generator: torch.Generator

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        """The names of the arguments that `make` takes."""
        own: list[str] = []
        for kind in cls.__mro__:
            if "__init__" not in vars(kind):
                continue
            found = inspect.signature(kind.__init__).parameters.values()
            rest = [p.name for p in found if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            own = [p.name for p in found if p.name not in ("self", *rest)] + own
            # What is passed on, the class above takes.
            if not rest:
                break
        return tuple(own)

    @classmethod
    def make(cls, **arguments: Any) -> Self:
        """This method from plain settings, some of `accepted`."""
        return cls(**arguments)

    def setup(self, model: nn.Module) -> None:
        """Prepare the model, once: put the adapters in, freeze the rest."""

    def stages(self, count: int) -> list[tuple[int, ...]]:
        """Which tasks' training data each stage of learning sees; by default one task a stage.

        Args:
            count: tasks of the stream.
        Returns:
            A list of tuples of task indices; an empty tuple is a stage without training.
        """
        return [(index,) for index in range(count)]

    def begin_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        """Called before training task `index`; the trainable parameters are read after it.

        Args:
            stage: the task's training data.
        """

    def auxiliary(self, model: nn.Module) -> Tensor | None:
        """A loss from the last forward pass of a micro-batch (a scalar with graph), or None."""

    def image_loss(self, batch: EncodedBatch) -> Tensor | None:
        """A batch's loss in place of the benchmark's (a scalar with graph), or None.

        For CLIP models alone. Every process computes it for the whole batch.
        """

    def penalty(self, model: nn.Module, step: Step) -> Tensor | None:
        """A loss on the parameters (a scalar with graph), once per optimiser step, or None."""

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Called with all gradients in place, before they are clipped and applied."""

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Called after the optimiser changed the parameters."""

    def end_task(self, model: nn.Module, index: int, stage: Stage) -> None:
        """Called after training task `index`; the arguments are those of `begin_task`."""

    def select(self, model: nn.Module, index: int) -> None:
        """Called before task `index` is scored; only methods with needs_task_id may use it."""

    def prompts(self, task: Task, count: Callable[[str], int]) -> list[str] | None:
        """The prompts to score a task with, or None for the task's own.

        Args:
            count: function from text to its number of tokens.
        """

    def classifier(self, clip: Clip, prompts: Tensor) -> Classifier:
        """How a CLIP model classifies images, after the tasks so far.

        Args:
            clip: in eval mode and without gradients.
            prompts: token ids [C, L] of the classes of all tasks, also of those to come.
        Returns:
            A function from a batch of images to a score for each class [B, C].
        """
        texts = clip.encode_text(prompts)
        return lambda images: clip.logits(images.features(), texts)

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered besides the adapters' tensors: nested dicts of tensors, numbers
        and lists."""
        generator = getattr(self, "generator", None)
        return {} if generator is None else {"generator": generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if "generator" in state:
            self.generator.set_state(state["generator"])

    def written_bytes(self, model: nn.Module, count: int) -> int:
        """About how many bytes a run over `count` tasks writes at once, before it begins.

        Here for methods that train: a state with the adapters of all tasks and the optimiser's two
        moments, the state that it replaces, and the adapters once more.
        """
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return trained * (3 * count + 4)

    def stored_bytes(self, model: nn.Module) -> int:
        """Bytes to keep besides the base model in order to go on learning: the adapters' tensors
        and whatever `state_dict` holds."""
        held = [t for a in adapters(model, Adapter).values() for t in a.adapter_state().values()]
        held += _tensors({k: v for k, v in self.state_dict().items() if k != "generator"})
        return sum(t.numel() * t.element_size() for t in held)


def check_order(stage: ImageStage, learned: int) -> None:
    """Refuse a task whose classes do not follow those that are learned."""
    if stage.offset != learned:
        raise ValueError(
            f"tasks must be learned in order: {learned} classes are learned, but this task's "
            f"begin at {stage.offset}"
        )


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, added up in order."""
    return reduce(torch.add, terms)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (list, tuple)):
        return []
    return [tensor for item in state for tensor in _tensors(item)]
