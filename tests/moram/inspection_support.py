"""A model whose atoms fire as one can count by hand. No tests here."""

import math

import torch
from torch import nn

import moram
from moram import MoRAMConfig, adapters

# One line a token: 1 to 4 are the axes, 5 lies between two of them. The padding, 0, is the same as
# token 4, so that an atom which only padding fires would show.
TABLE = torch.tensor(
    [[0, 0, 0, 1.0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]]
)
# softmax over the two selected scores 1 and 0 is (3/4, 1/4), and the threshold cuts the 1/4.
RULE = {"top_k": 2, "temperature": 1 / math.log(3), "threshold": 0.5}
# Tasks "one" and "two": 3 tokens with padding on the left, 2 with padding on the right.
INPUTS = {
    "one": [(torch.tensor([[0, 1, 1, 5]]), torch.tensor([[0, 1, 1, 1]]))],
    "two": [(torch.tensor([[3, 5, 0]]), torch.tensor([[1, 1, 0]]))],
}


class Lookup(nn.Module):
    """A language model in which every projection reads the embedding of the token."""

    def __init__(self, names=("first",)):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(TABLE)
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.skipped = ()

    def forward(self, input_ids, attention_mask, use_cache):
        x = self.embed(input_ids)
        return [layer(x) for name, layer in self.layers.items() if name not in self.skipped]


def set_keys(bank, order):
    """Let atom i of a bank respond to the axis order[i]."""
    keys = torch.eye(4)[list(order)]
    with torch.no_grad():
        bank.frozen_keys[: bank.num_frozen] = keys[: bank.num_frozen]
        bank.current_keys.copy_(keys[bank.num_frozen :])


def lookup(names=("first",), orders=(range(4),), sizes=(2, 2)):
    """A `Lookup` after two tasks, the second one's atoms current, with keys set by hand."""
    model = Lookup(names)
    moram.inject(model, MoRAMConfig(atoms_per_task=sizes[0], targets=("layers.*",), **RULE))
    moram.grow(model, sizes[1])
    for adapter, order in zip(adapters(model).values(), orders, strict=True):
        set_keys(adapter.bank, order)
    return model.eval()
