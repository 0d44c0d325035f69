"""Text examples to tensors, and exact-match accuracy of greedy decoding in one forward pass."""

from typing import NamedTuple

import torch

IGNORED = -100


class Encoded(NamedTuple):
    """Examples as tensors [n, L], padded on the left; labels are IGNORED outside the answer.

    tail: how many final positions hold every example's answer and its end.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    tail: int

    def __len__(self):
        return len(self.input_ids)

    def batch(self, rows):
        """(input_ids, attention_mask, labels) of some examples."""
        return self.input_ids[rows], self.attention_mask[rows], self.labels[rows]

    def num_labels(self, rows):
        """Answer tokens of some examples together."""
        return int(self.labels[rows].ne(IGNORED).sum())


def encode(tokenizer, examples, max_length=192, multiple=16):
    """Tokenise prompt + answer + end of text; long prompts lose their first tokens.

    Each prompt begins, once, with what the tokenizer itself puts before a text (`beginning`).

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: sequence of `Example`.
        max_length: tokens at most.
        multiple: lengths are padded up to a multiple of this, so that few shapes occur: bfloat16
            products compile a kernel for each new shape on CPU.
    Raises:
        ValueError: an answer leaves no room for its prompt.
    """
    rows, begin = [], beginning(tokenizer)
    for prompt, answer in examples:
        head = without_beginning(tokenizer(prompt, add_special_tokens=False).input_ids, begin)
        spaced = answer if prompt[-1:].isspace() else f" {answer}"
        tail = [*tokenizer(spaced, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        room = max_length - len(tail) - len(begin)
        if room < 1:
            raise ValueError(
                f"an answer has {len(tail)} tokens, max_length is {max_length}: {answer!r:.60}"
            )
        rows.append(([*begin, *head[-room:]], tail))
    longest = max(len(head) + len(tail) for head, tail in rows)
    length = -(-longest // multiple) * multiple
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (head, tail) in enumerate(rows):
        used = len(head) + len(tail)
        ids[i, -used:] = torch.tensor(head + tail)
        mask[i, -used:] = 1
        labels[i, -len(tail) :] = torch.tensor(tail)
    return Encoded(ids, mask, labels, max(len(tail) for _, tail in rows))


def beginning(tokenizer):
    """The tokens that a tokenizer itself puts before a text: often one, often none.

    Models that were trained with a beginning-of-text token (Gemma, Llama 3) need it.

    Args:
        tokenizer: a Hugging Face tokenizer.
    Returns:
        list of token ids.
    """
    # A tokenizer may end texts, too: what stands before one tells the two apart.
    if not list(tokenizer("", add_special_tokens=True).input_ids):
        return []
    whole, alone = (
        list(tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False)
    )
    starts = range(len(whole) - len(alone) + 1)
    return next((whole[:s] for s in starts if whole[s : s + len(alone)] == alone), [])


def without_beginning(ids, begin):
    """The tokens of a text that may begin as the tokenizer would let it begin."""
    return ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids


def answer_logits(model, input_ids, attention_mask, tail):
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


@torch.no_grad()
def predict(model, encoded, batch_size, step=lambda count: None):
    """Most likely token at each answer position, given the true tokens before it [n, tail], CPU.

    Args:
        step: called after each batch with the number of examples done in it.
    """
    was_training = model.training
    model.eval()
    total, tail, out = len(encoded.input_ids), encoded.tail, []
    device = next(model.parameters()).device
    for start in range(0, total, batch_size):
        # The last batch is filled up with earlier examples, so that no new shape occurs.
        rows = torch.arange(start, start + batch_size) % total
        ids, mask = encoded.input_ids[rows].to(device), encoded.attention_mask[rows].to(device)
        logits = answer_logits(model, ids, mask, tail)
        kept = min(batch_size, total - start)
        out.append(logits[:kept].argmax(-1).cpu())
        step(kept)
    model.train(was_training)
    return torch.cat(out)


def exact_match(predictions, encoded):
    """Percent of examples whose whole answer is what greedy decoding would write.

    Greedy decoding writes the answer exactly if each of its tokens is the most likely one after
    the true tokens before it, so one forward pass decides. The end of text is not required, as in
    TRACE's accuracy, which compares the first characters.
    """
    labels = encoded.labels[:, -encoded.tail :].clone()
    labels[:, -1] = IGNORED
    right = (predictions == labels) | (labels == IGNORED)
    return 100 * right.all(-1).double().mean().item()
