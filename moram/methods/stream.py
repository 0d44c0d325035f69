"""A whole stream in memory, start to end: what the demo runs. `moram.trace` is the full harness."""

import time
from dataclasses import dataclass, field

from ..continual.metrics import majority_accuracy
from ..continual.scoring import encode, exact_match, predict
from ..inject import warn_uncalled
from .train import Stage, TaskTrainer


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
        stage = Stage(model, train, settings)
        method.begin_task(model, index, stage)
        trainer = TaskTrainer(model, method, train, settings, index)
        result.trained.append(sum(p.numel() for p in trainer.parameters))
        losses, start = [], time.perf_counter()

        def note(_, loss, losses=losses):
            losses.append(loss)
            step(settings.batch_size)

        trainer.run(note)
        result.seconds.append(time.perf_counter() - start)
        result.losses.append(losses)
        method.end_task(model, index, stage)
        warn_uncalled(model)
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
    """Accuracy in percent on every task's test part, and the predictions.

    Args:
        data: as from `encode_stream`. settings: `TrainSettings`.
        step: called with the number of examples answered since the last call.
    """
    predictions = [predict(model, test, settings.batch_size, step) for _, test in data]
    pairs = zip(predictions, data, strict=True)
    return [exact_match(found, test) for found, (_, test) in pairs], predictions
