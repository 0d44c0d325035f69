"""Task boundaries for Hugging Face's Trainer: a callback for one task, and a loop over many.

Needs transformers. Any subclass of Trainer will do, such as TRL's SFTTrainer.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import load, save
from .continual.metrics import backward_transfer, forgetting, overall_performance, plasticity
from .inject import adapters, parameters
from .inputs import Batches
from .sharded import is_sharded
from .task import begin_task, end_task

ADAPTERS, MATRIX = "adapters", "matrix.json"


class TaskCallback(TrainerCallback):
    """What entering and leaving `moram.task` does, when a Trainer begins and ends to train.

    A training that an exception ends leaves the task open, and a checkpoint of a PEFT model keeps
    what it needs: going on from it goes on with the task.

    Args:
        batches: the task's inputs, as for `moram.task`; needed with protect alone.
        generator: for the new keys.
    """

    def __init__(
        self, batches: Batches | None = None, generator: torch.Generator | None = None
    ) -> None:
        self.batches: Batches | None = batches
        self.generator: torch.Generator | None = generator

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin a task, and let the Trainer's optimiser begin it afresh.

        Args: as for `transformers.TrainerCallback`.
        """
        for adapter in adapters(model).values():
            adapter.bank.check_whole()
            dtype = adapter.bank.frozen_keys.dtype
            for parameter in adapter.bank.parameters():
                if parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
        earlier = parameters(model)
        is_fresh = any(adapter.bank.learned for adapter in adapters(model).values())
        atoms = begin_task(model, self.batches, generator=self.generator)
        if is_fresh and optimizer is not None:
            _renew(optimizer, earlier, atoms)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """End a task.

        Args: as for `transformers.TrainerCallback`.
        """
        end_task(model, self.batches)


def _renew(optimizer: Any, earlier: list[nn.Parameter], atoms: list[nn.Parameter]) -> None:
    """Let an optimiser of earlier atoms train those in their places, without their moments."""
    pairs = list(zip(earlier, atoms, strict=True))
    if any(old is not new and hasattr(old, "_hp_mapping") for old, new in pairs):
        raise RuntimeError(
            "a task under DeepSpeed must have as many atoms as the one before: its optimiser takes "
            "no new parameters; call moram.grow(model) before the training"
        )
    places = {id(old): new for old, new in pairs}
    for group in optimizer.param_groups:
        group["params"] = [places.get(id(p), p) for p in group["params"]]
    for parameter in earlier:
        optimizer.state.pop(parameter, None)


class Learned(NamedTuple):
    """What `train_tasks` found: `matrix` is R[t][i], the score on task i after task t."""

    matrix: list[list[float]]

    def summary(self) -> dict[str, float]:
        """The library's metrics of the matrix, by name."""
        metrics = (overall_performance, plasticity, backward_transfer, forgetting)
        return {metric.__name__: metric(self.matrix) for metric in metrics}


def train_tasks(
    model: nn.Module,
    tasks: Mapping[str, Any],
    make_trainer: Callable[[nn.Module, Any, str], Trainer],
    score: Callable[[nn.Module, str], float],
    out: str | Path,
    *,
    seed: int = 0,
) -> Learned:
    """Learn tasks one after the other, each with a Trainer of its own.

    After a task its adapter is in out/adapters and the scores in out/matrix.json. Called again,
    with a model made in the same way, it goes on after the last finished task; inside a task it
    goes on from the Trainer's last checkpoint where the model is a PEFT model, and begins the task
    anew where it is not.

    Args:
        model: after `get_peft_model` or `moram.inject`.
        tasks: training data by the task's name, in order.
        make_trainer: function from model, data and output folder to a fresh `Trainer`.
        score: function from model and a task's name to a score in percent.
        out: folder of the run.
        seed: the new keys of task t are drawn from seed + t.
    Returns:
        `Learned`.
    Raises:
        ValueError: out holds a run of other tasks, or a Trainer's settings cannot work.
    """
    out, names = Path(out), list(tasks)
    done, matrix = _finished(model, out)
    if done != names[: len(done)]:
        raise ValueError(
            f"out must be empty or hold a run of these tasks, got {out}, which holds "
            f"{', '.join(done)}"
        )
    adapter = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    for index, name in enumerate(names):
        if index < len(done):
            continue
        folder = out / name
        atoms = [(p, p.data) for p in parameters(model)]
        trainer = make_trainer(model, tasks[name], str(folder))
        for parameter, data in atoms:
            # SFTTrainer rounds what is trainable on a quantised base to bfloat16.
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        # In one order and without a draw, so that the training is the one without protection's.
        # Some trainers prepare the data first.
        data: Any = trainer.train_dataset
        batches = trainer.get_eval_dataloader(tasks[name] if data is None else data)
        trainer.add_callback(TaskCallback(batches, torch.Generator().manual_seed(seed + index)))
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "cpu_ram_efficient_loading", False):
            raise ValueError(
                "fsdp_config['cpu_ram_efficient_loading'] must be False, got True: accelerate then "
                "deals out parameters alone, and frozen atoms are buffers; leave it out"
            )
        begun = get_last_checkpoint(folder) if adapter is not None and folder.is_dir() else None
        if begun and trainer.is_fsdp_enabled:
            # It fills tensors of the size that are there, before the Trainer would load anything.
            load(model, begun)
        trainer.train(resume_from_checkpoint=begun)
        matrix.append([score(model, other) for other in names])
        if adapter is not None:
            # For its model card.
            adapter.tasks, adapter.matrix = names[: index + 1], matrix
        if trainer.is_world_process_zero():
            _write(out / MATRIX, matrix)
        if trainer.is_world_process_zero() or is_sharded(model):
            # What is cut up, all must put together; the first one writes.
            save(model, out / ADAPTERS, tasks=names[: index + 1])
        trainer.accelerator.wait_for_everyone()
    return Learned(matrix)


def _finished(model: nn.Module, out: Path) -> tuple[list[str], list[list[float]]]:
    """The tasks that are done, which the model then has learned, and their rows of R."""
    if not (out / ADAPTERS).is_dir():
        return [], []
    done = load(model, out / ADAPTERS)["tasks"]
    matrix = json.loads((out / MATRIX).read_text(encoding="utf-8"))
    return done, matrix[: len(done)]


def _write(path: Path, matrix: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(matrix) + "\n", encoding="utf-8")
    os.replace(temporary, path)
