"""Teach a tiny language model two tasks with PEFT and Hugging Face's Trainer; prints R, percent.

python -m moram.examples.learn_with_peft
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moram.peft
from moram.trainer import train_tasks

# protect is this project's addition to the published rule, which it is without.
ADAPTER = moram.peft.MoRAMPeftConfig(
    target_modules="llama", task_type="CAUSAL_LM", atoms_per_task=4, top_k=4, protect=0.95
)
# Count up with half of the tokens, and down with the other half.
NUMBERS = {"up": torch.arange(1, 32), "down": torch.arange(62, 31, -1)}
TASKS = {name: [{"input_ids": ids, "labels": ids}] * 240 for name, ids in NUMBERS.items()}


def make_model() -> LlamaForCausalLM:
    """The same small model every time."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim, config.initializer_range = 16, 0.3
    return LlamaForCausalLM(config)


def make_trainer(model: torch.nn.Module, data: Any, out: str) -> Trainer:
    """A task's Trainer."""
    settings = TrainingArguments(out, max_steps=60, learning_rate=1e-2, report_to=[])
    return Trainer(model, settings, train_dataset=data)


@torch.no_grad()
def score(model: torch.nn.Module, name: str) -> float:
    """Percent of a task's tokens that the model says after those before it."""
    ids = NUMBERS[name][None]
    found = model(input_ids=ids).logits[0, :-1].argmax(-1)
    return float(100 * (found == ids[0, 1:]).float().mean())


def main() -> list[list[float]]:
    """R, as learned and as loaded again by PEFT alone."""
    with TemporaryDirectory() as out:
        model = get_peft_model(make_model(), ADAPTER)
        found = train_tasks(model, TASKS, make_trainer, score, out)
        loaded = PeftModel.from_pretrained(make_model(), str(Path(out) / "adapters"))
        assert [score(loaded.eval(), name) for name in TASKS] == found.matrix[-1]
    return found.matrix


if __name__ == "__main__":
    print(main())
