"""Tasks for a Trainer to teach a tiny model, and how they are scored. No tests here."""

import torch
from task_support import seeded
from transformers import Trainer, TrainerCallback, TrainingArguments


def rows_of(task, count=8):
    """Examples of a task with tokens of its own."""
    ids = torch.randint(1 + 20 * task, 20 + 20 * task, (count, 6), generator=seeded(task))
    return [{"input_ids": row, "labels": row} for row in ids]


TASKS = {"first": rows_of(0), "second": rows_of(1), "third": rows_of(2)}
TWO = dict(list(TASKS.items())[:2])


def arguments(folder, **changes):
    """Four steps on the CPU, in silence."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2}
    settings |= {"report_to": [], "use_cpu": True, "seed": 5, "save_steps": 2}
    settings |= {"disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(folder, **(settings | changes))


def make_trainer(model, data, folder, **changes):
    """A fresh Trainer for a task."""
    return Trainer(model, arguments(folder, **changes), train_dataset=data)


def score(model, name):
    """Minus the loss on a task, which is as good as any score here."""
    ids = torch.stack([row["input_ids"] for row in TASKS[name]])
    with torch.no_grad():
        return -float(model.eval()(input_ids=ids, labels=ids).loss)


class Stop(TrainerCallback):
    """Ends a training by an exception, as a crash does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt
