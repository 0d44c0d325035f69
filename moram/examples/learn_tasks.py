"""Teach a causal language model tasks one after the other, without a harness.

python -m moram.examples.learn_tasks MODEL TASK_FOLDER ... > matrix.json

MODEL is a folder or a hub id, a task's folder is in TRACE's format; adapters go to "adapters".
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import moram

# Token ids of prompts and answers.
Rows = list[tuple[list[int], list[int]]]


def read(tokenizer: PreTrainedTokenizerBase, folder: str, split: str, most: int = 112) -> Rows:
    """The (prompt, answer) of each example as token ids; long prompts lose their beginning.

    Args:
        tokenizer: the model's. folder: of the task. split: "train" or "test".
        most: tokens of a prompt at most.
    """
    rows = json.loads((Path(folder) / f"{split}.json").read_text(encoding="utf-8"))
    answers = [tokenizer(" " + row["answer"], add_special_tokens=False).input_ids for row in rows]
    prompts = [tokenizer(row["prompt"]).input_ids[-most:] for row in rows]
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return [(p, [*a, end]) for p, a in zip(prompts, answers, strict=True)]


def batch(rows: Rows) -> dict[str, Tensor]:
    """What the model is called with; padded on the left, and the answer alone is learned."""
    width = max(len(prompt + answer) for prompt, answer in rows)

    def padded(parts: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(part)) + part for part in parts])

    return {
        "input_ids": padded([prompt + answer for prompt, answer in rows], 0),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in rows], 0),
        "labels": padded([answer for _, answer in rows], -100),
    }


def learn(
    model: nn.Module,
    stream: Sequence[Sequence[Rows]],
    config: moram.MoRAMConfig,
    lr: float = 3e-3,
    epochs: int = 1,
    size: int = 4,
    seed: int = 0,
) -> list[list[float]]:
    """Learn the tasks one after the other.

    Args:
        model: a causal language model, which is changed. config: `MoRAMConfig`.
        stream: of each task, its (training, test) rows as `read` gives them.
        lr: peak learning rate. epochs: passes over a task. size: examples a step.
        seed: of the keys and of the order of examples.
    Returns:
        R[t][i], the score of task i after learning task t.
    """
    generator, matrix = torch.Generator().manual_seed(seed), []
    moram.inject(model, config, generator=generator)
    for index, (train, _) in enumerate(stream):
        batches = [batch(train[i : i + size]) for i in range(0, len(train), size)]
        with moram.task(model, batches, generator=generator) as atoms:
            optimizer = torch.optim.AdamW(atoms, lr=lr, weight_decay=0.0)
            steps = epochs * (len(train) // size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=steps))
            model.train()
            for epoch in range(epochs):
                order = torch.Generator().manual_seed((seed * 1000 + index) * 1000 + epoch)
                rows = torch.randperm(len(train), generator=order).tolist()
                for i in range(0, len(train) // size * size, size):
                    model(**batch([train[row] for row in rows[i : i + size]])).loss.backward()
                    torch.nn.utils.clip_grad_norm_(atoms, 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        matrix.append([score(model, test) for _, test in stream])
    return matrix


def rate(done: int, steps: int) -> float:
    """A warm-up over a tenth of the steps, then a linear decay to zero, as a part of the peak."""
    warmup = max(1, steps // 10)
    return min((done + 1) / warmup, (steps - done) / max(1, steps - warmup))


@torch.no_grad()
def score(model: nn.Module, rows: Rows) -> float:
    """Percent of examples whose answer's every token is the most likely one."""
    model.eval()
    right = 0
    for prompt, answer in rows:
        found = model(**batch([(prompt, answer)])).logits[0, len(prompt) - 1 : -2].argmax(-1)
        right += found.tolist() == answer[:-1]
    return 100 * right / len(rows)


def main(name: str, *folders: str) -> None:
    """Learn the tasks of some folders, print R and keep the adapters."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    stream = [[read(tokenizer, folder, split) for split in ("train", "test")] for folder in folders]
    # protect is this project's addition to the published rule, which it is without.
    config = moram.MoRAMConfig(atoms_per_task=8, top_k=8, protect=0.95)
    print(json.dumps(learn(model, stream, config)))
    moram.save(model, "adapters", tasks=[Path(folder).name for folder in folders])


if __name__ == "__main__":
    main(*sys.argv[1:])
