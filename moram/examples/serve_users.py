"""Serve users' adapters beside each other in one model, with a static cache; a tiny random LLaMA.

python -m moram.examples.serve_users
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moram.peft

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"vocab_size": 64, "num_attention_heads": 4, "initializer_range": 0.3}
ADAPTER = moram.peft.MoRAMPeftConfig(target_modules="llama", atoms_per_task=4, top_k=4)
# One counts up, the other down.
USERS = {"ada": torch.arange(1, 33), "bob": torch.arange(63, 31, -1)}


def make_model() -> LlamaForCausalLM:
    """The same small model every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def teach(user: str, out: str, steps: int = 60) -> None:
    """Learn what a user writes, and save the adapter in out/user."""
    model, ids = get_peft_model(make_model(), ADAPTER, adapter_name=user), USERS[user].repeat(4, 1)
    with moram.task(model) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=1e-2)
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(out)


def main() -> list[list[int]]:
    """What the model writes for each user by turns, twice."""
    first, *others = USERS
    with TemporaryDirectory() as out:
        for user in USERS:
            teach(user, out)
        model = PeftModel.from_pretrained(make_model(), f"{out}/{first}", adapter_name=first)
        for user in others:
            model.load_adapter(f"{out}/{user}", user)
    ways, written = {"cache_implementation": "static", "max_new_tokens": 8, "do_sample": False}, []
    for user in [*USERS, *USERS]:
        model.eval().set_adapter(user)
        written.append(model.generate(input_ids=USERS[user][None, :5], **ways)[0].tolist())
        print(f"{user}: {written[-1]}")
    return written


if __name__ == "__main__":
    main()
