"""A tiny model, tasks with their own tokens, and how a user learns them. No tests here."""

import torch
from tiny_models import language_model, small_config

import moram
from moram import adapters

PROTECT = {"protect": 0.9, "protect_size": 6, "top_k": 4, "value_scale": 8.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batches_of(task, count=3):
    """Batches of a task whose tokens come from its own part of the vocabulary; some are padding."""
    found = []
    for number in range(count):
        generator = seeded(100 * task + number)
        ids = torch.randint(1 + 20 * task, 20 + 20 * task, (2, 6), generator=generator)
        mask = torch.ones(2, 6, dtype=torch.int64)
        mask[1, 4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return found


def learn(model, task, batches=None, steps=None, generator=None, **more):
    """Learn a task the way a user does."""
    batches = batches_of(task) if batches is None else batches
    with moram.task(model, batches, generator=generator, **more) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=0.02)
        for batch in batches[:steps]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def llama(**settings):
    model = language_model()
    moram.inject(model, small_config(**settings), generator=seeded())
    return model


def tensors(model):
    found = {}
    for path, adapter in adapters(model).items():
        bank = adapter.bank
        parts = {**bank.state_dict(), "learned": torch.tensor(bank.learned)}
        if bank.sketch is not None:
            parts |= {"rows": bank.sketch.rows, "total": bank.sketch.total}
        if bank.guard is not None:
            parts |= {"basis": bank.guard[0], "gain": torch.tensor(bank.guard[1])}
        found |= {f"{path}.{name}": tensor.detach().clone() for name, tensor in parts.items()}
    return found
