"""What training and scoring of texts share: what begins one, and the logits of its answer."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that a tokenizer itself puts before a text: often one, often none.

    Models that were trained with a beginning-of-text token (Gemma, Llama 3) need it.
    """
    # A tokenizer may end texts, too: what stands before one tells the two apart.
    if not list(tokenizer("", add_special_tokens=True).input_ids):
        return []
    whole, alone = (
        list(tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False)
    )
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:s] for s in starts if whole[s : s + len(alone)] == alone), [])


def without_beginning(ids: list[int], begin: list[int]) -> list[int]:
    """The tokens of a text that may begin as the tokenizer would let it begin."""
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids


def answer_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tail: int) -> Tensor:
    """Logits that predict the last `tail` positions [B, tail, V]; the others are not computed.

    Args:
        input_ids: token ids [B, L], or embeddings [B, L, D] in their place.
    """
    length = input_ids.shape[1]
    # Positions as a tensor: their hidden states are then gathered into whole rows. A slice would
    # reach the head with gaps, and torch would copy the head's weight once per example.
    positions = torch.arange(length - tail - 1, length - 1, device=input_ids.device)
    name = "inputs_embeds" if input_ids.is_floating_point() else "input_ids"
    output = model(
        **{name: input_ids},
        attention_mask=attention_mask,
        logits_to_keep=positions,
        use_cache=False,
    )
    return output.logits
