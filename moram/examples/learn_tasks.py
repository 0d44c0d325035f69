"""Teach a language model tasks in TRACE's format one after the other; prints R, percent.

python -m moram.examples.learn_tasks MODEL TASK_FOLDER ...
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import moram


def read(tokenizer, file, most=112):
    """The examples of a file as token ids, of which the answer alone is learned."""
    for row in json.loads(Path(file).read_text(encoding="utf-8")):
        prompt = tokenizer(row["prompt"])["input_ids"][-most:]
        answer = tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        yield {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def learn(model, collate, rows, index, generator, lr=3e-3, epochs=1, size=4, seed=0):
    """Learn the rows of the task of that index; generator: for its keys. seed: of the order."""
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    steps = epochs * (len(rows) // size)
    up = max(1, steps // 10)
    with moram.task(model, batches, generator=generator) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=lr, weight_decay=0.0)
        model.train()
        for step in range(steps):
            epoch, place = divmod(step, len(rows) // size)
            order = torch.Generator().manual_seed((seed * 1000 + index) * 1000 + epoch)
            picked = torch.randperm(len(rows), generator=order)[place * size :][:size]
            model(**collate([rows[row] for row in picked])).loss.backward()
            torch.nn.utils.clip_grad_norm_(atoms, 1.0)
            # A warm-up over a tenth of the steps, then a linear decay.
            rate = min((step + 1) / up, (steps - step) / max(1, steps - up))
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def score(model, collate, rows):
    """Percent of examples whose answer's every token is the most likely one."""
    model.eval()
    right = 0
    for row in rows:
        batch = collate([row])
        wanted, found = batch["labels"][0, 1:], model(**batch).logits[0, :-1].argmax(-1)
        right += bool((found == wanted)[wanted >= 0][:-1].all())
    return 100 * right / len(rows)


def learn_all(model, tokenizer, folders, config, seed=0, **how):
    """R[t][i], the score of task i after learning task t; how: see `learn`."""
    collate, generator = DataCollatorForSeq2Seq(tokenizer), torch.Generator().manual_seed(seed)
    tests = [list(read(tokenizer, f"{folder}/test.json")) for folder in folders]
    moram.inject(model, config, generator=generator)
    for index, folder in enumerate(folders):
        rows = list(read(tokenizer, f"{folder}/train.json"))
        learn(model, collate, rows, index, generator, seed=seed, **how)
        yield [score(model, collate, test) for test in tests]


if __name__ == "__main__":
    name, *folders = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name)
    # protect is this project's addition to the published rule, which it is without.
    config = moram.MoRAMConfig(atoms_per_task=8, top_k=8, protect=0.95)
    print(json.dumps([*learn_all(model, tokenizer, folders, config)]))
    moram.save(model, "adapters", tasks=[Path(folder).name for folder in folders])
