"""Teach a language model tasks in TRACE's format one after the other; prints R, percent.

python -m moram.examples.learn_tasks MODEL TASK_FOLDER ...
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import moram

# protect is this project's addition to the published rule, which it is without.
CONFIG = moram.MoRAMConfig(atoms_per_task=8, top_k=8, protect=0.95)


class Learner:
    """A causal language model with adapters.

    Args: lr: at its peak. epochs: passes over a task. size: examples a step.
    """

    def __init__(
        self,
        name: str,
        config: moram.MoRAMConfig = CONFIG,
        lr: float = 3e-3,
        epochs: int = 1,
        size: int = 4,
        seed: int = 0,
    ) -> None:
        self.lr, self.epochs, self.size, self.seed, self.tasks = lr, epochs, size, seed, 0
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(name)
        self.generator = torch.Generator().manual_seed(seed)
        moram.inject(self.model, config, generator=self.generator)

    def read(self, file: str) -> list[dict[str, list[int]]]:
        """The examples of a file as token ids, of which the answer alone is learned."""
        tokens, rows = self.tokenizer, []
        for row in json.loads(Path(file).read_text(encoding="utf-8")):
            prompt = tokens(row["prompt"])["input_ids"][-112:]
            answer = tokens(" " + row["answer"], add_special_tokens=False)["input_ids"]
            answer = [*answer, tokens.eos_token_id]
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return rows

    def learn(self, folder: str) -> None:
        """Learn a task, with a warm-up over a tenth of the steps and a linear decay."""
        rows, size = self.read(f"{folder}/train.json"), self.size
        batches = [self.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        steps = self.epochs * (len(rows) // size)
        up = max(1, steps // 10)
        with moram.task(self.model, batches, generator=self.generator) as atoms:
            optimizer = torch.optim.AdamW(atoms, weight_decay=0.0)
            self.model.train()
            for step in range(steps):
                epoch, place = divmod(step, len(rows) // size)
                seed = (self.seed * 1000 + self.tasks) * 1000 + epoch
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
                batch = self.collate([rows[i] for i in order[place * size :][:size]])
                self.model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(atoms, 1.0)
                rate = min((step + 1) / up, (steps - step) / max(1, steps - up))
                optimizer.param_groups[0]["lr"] = self.lr * rate
                optimizer.step()
                optimizer.zero_grad()
        self.tasks += 1

    @torch.no_grad()
    def score(self, folder: str) -> float:
        """Percent of test examples whose answer's every token is the most likely one."""
        self.model.eval()
        right, rows = 0, self.read(f"{folder}/test.json")
        for batch in (self.collate([row]) for row in rows):
            wanted, found = batch["labels"][0, 1:], self.model(**batch).logits[0, :-1].argmax(-1)
            right += bool((found == wanted)[wanted >= 0][:-1].all())
        return 100 * right / len(rows)


if __name__ == "__main__":
    learner, folders = Learner(sys.argv[1]), sys.argv[2:]
    for folder in folders:
        learner.learn(folder)
        print(json.dumps([learner.score(other) for other in folders]), flush=True)
    moram.save(learner.model, "adapters", tasks=[Path(folder).name for folder in folders])
