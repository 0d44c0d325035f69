"""A tokenizer of whole words, a stream of learnable toy tasks, and learning it. No tests here."""

import re
from types import SimpleNamespace

import torch

from moram.continual import Example, Task
from moram.continual.scoring import answer_logits
from moram.methods.train import Stage, TaskTrainer
from moram.trace.encode import Rows


class WordTokenizer:
    """Each word, with the space before it, is one token; ids are given in order of appearance."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self):
        self.ids = {}

    def __call__(self, text):
        return [self[word] for word in re.findall(r"\s*\S+", text)]

    def __getitem__(self, word):
        return self.ids.setdefault(word, len(self.ids) + 2)


def toy_stream(tasks=2, copies=4):
    """Tasks with words of their own, whose answer is the class of the word."""
    stream = []
    for t in range(tasks):
        examples = [
            Example(f"Q{t} {filler} w{t}{c}{v} ?", "AB"[c])
            for c in range(2)
            for v in range(2)
            for filler in ("the", "a", "one", "some")[:copies]
        ]
        stream.append(Task(f"task{t}", tuple(examples), tuple(examples[::2])))
    return stream


def encode(tokenizer, examples):
    """`Rows` of prompts with their answers, of one token, and the end of text."""
    ids = [[*tokenizer(f"{e.prompt} {e.answer}"), tokenizer.eos_token_id] for e in examples]
    return Rows(ids, [2] * len(ids), tokenizer.pad_token_id, multiple=16)


def stages_of(method, tasks=2):
    """The training and test data of each stage of a toy stream."""
    tokenizer, stream = WordTokenizer(), toy_stream(tasks)
    # A token's id is given when it is first seen: task after task, training examples first.
    data = [tuple(encode(tokenizer, part) for part in (t.train, t.test)) for t in stream]
    return [
        tuple(Rows.join([data[i][k] for i in members]) for k in (0, 1))
        for members in method.stages(tasks)
    ]


@torch.no_grad()
def accuracy(model, rows):
    """Percent of examples whose answer is the most likely token."""
    right = []
    for part in torch.arange(len(rows)).split(4):
        ids, mask, labels = rows.batch(part)
        found = answer_logits(model, ids, mask, 2)[:, 0].argmax(-1)
        right.append(found.eq(labels[:, -2]))
    return 100 * torch.cat(right).double().mean().item()


def learn_stages(method, model, data, settings, *, start=None, processes=None, note=None):
    """Train on the stages, which are those from `start` of a stream that was set up, or all.

    `note` is called with each stage's index, trainer and losses at its end. Returns the model.
    """
    if start is None:
        method.setup(model)
        start = 0
    for index, (train, _) in enumerate(data, start):
        stage = Stage(model, train, settings)
        method.begin_task(model, index, stage)
        trainer = TaskTrainer(model, method, train, settings, index, processes)
        losses = []
        trainer.run(lambda _, loss, losses=losses: losses.append(loss))
        method.end_task(model, index, stage)
        if note:
            note(index, trainer, losses)
    return model


def learn_stream(method, model, settings, tasks=2):
    """Learn the toy tasks and score all of them after each, and before the first.

    Returns:
        untrained: a row of R; matrix: R; trained: parameters a task; losses: one list a task.
    """
    data = stages_of(method, tasks)

    def row():
        return [accuracy(model, test) for _, test in data]

    found = SimpleNamespace(untrained=row(), matrix=[], trained=[], losses=[])

    def note(index, trainer, losses):
        found.trained.append(sum(p.numel() for p in trainer.parameters))
        found.losses.append(losses)
        found.matrix.append(row())

    learn_stages(method, model, data, settings, note=note)
    return found
