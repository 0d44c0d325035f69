"""See which task's atoms fire for which task's inputs; a tiny random LLaMA and toy tasks.

python -m moram.examples.look_at_atoms
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moram
from moram.inspection import inspect_atoms, token_atoms

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
TOYS = {"up": torch.arange(1, 33).repeat(4, 1), "down": torch.arange(63, 31, -1).repeat(4, 1)}


def main(steps: int = 30, protect: float | None = 0.95) -> Tensor:
    """Learn two tasks and look; returns percent of the weight [input's task][atoms' task]."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, initializer_range=0.3, **SIZES))
    # protect is this project's addition to the published rule; None is that rule.
    config = moram.MoRAMConfig(atoms_per_task=4, top_k=4, protect=protect)
    moram.inject(model, config, generator=torch.Generator().manual_seed(1))
    for ids in TOYS.values():
        batches = [{"input_ids": ids, "labels": ids}]
        with moram.task(model, batches, generator=torch.Generator().manual_seed(2)) as atoms:
            optimizer = torch.optim.AdamW(atoms, lr=1e-2)
            for _ in range(steps):
                model(**batches[0]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    inputs = {name: [(ids, torch.ones_like(ids))] for name, ids in TOYS.items()}
    report = inspect_atoms(model, inputs, list(TOYS))
    share = report.share()
    for name, row in zip(TOYS, share.tolist(), strict=True):
        shown = ", ".join(f"{v:.0f} % of {t}'s" for t, v in zip(TOYS, row, strict=True))
        print(f"on inputs of {name}, the atoms that write are {shown}")
    path = report.by_separation()[0]
    first = token_atoms(model, TOYS["up"][0, :8], path, list(TOYS))[-1]
    print(f"in {path}, at the last of eight tokens: {first}")
    return share


if __name__ == "__main__":
    main()
