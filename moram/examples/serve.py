"""Save adapters, load them into a fresh model, and let it write; a tiny random LLaMA.

python -m moram.examples.serve
"""

import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moram

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


def main(steps: int = 60) -> list[list[int]]:
    """Learn to count, save, load, continue a prompt; returns what both models wrote."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, initializer_range=0.3, **SIZES))
    fresh = copy.deepcopy(model)
    ids = torch.arange(1, 33).repeat(4, 1)
    moram.inject(model, moram.MoRAMConfig(atoms_per_task=4, top_k=4))
    with moram.task(model) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=1e-2)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with TemporaryDirectory() as folder:
        print(moram.save(model, folder, tasks=["count"]))
        about = moram.load(fresh, folder)
    print(f"loaded the tasks {about['tasks']}")
    prompt = torch.arange(1, 6)[None]
    written = []
    for each in (model, fresh):
        # Atoms whose score is below the threshold write nothing in eval mode.
        # transformers types `generate` for a protocol that its own models do not meet.
        out = each.eval().generate(  # pyright: ignore[reportAttributeAccessIssue]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        written.append(out[0].tolist())
    print(f"after {prompt[0].tolist()}: {written[1][5:]}")
    return written


if __name__ == "__main__":
    main()
