"""The fast path in torch calls alone, for any device: the forward pass.

Per token the work is one dense product (scores) and, for the values, only the selected atoms.
Frozen atoms cost no gradient work, and only the few scores and weights of the candidate atoms are
kept for the backward, beside all scores of banks that are not large.

Columns are atoms, frozen ones first. Each token has candidates: all atoms (`index` empty) or the
top_k, which `index` names. Whatever is outside the candidates has weight 0 and meets the backward
(`torch_backward.py`) only through the norm.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .aliases import Rule

# All measured in float32 on one and two AMD Zen cores, top_k = 8. Above this many atoms per
# selected one, a gather of the selected values beats the dense product: at 512 tokens of 576 the
# dense one is faster with 16 atoms, the gather with 64 ...
GATHER_RATIO = 4
# ... unless the dense product has fewer multiply-adds than this: then the gather's extra calls
# cost more than it saves.
DENSE_MACS = 2**21
# From this many tokens on, and from half as many as there are atoms, joining the two segments of a
# bank costs less than two products do.
JOIN_TOKENS = 64
# Up to this many scores, calls cost more than arithmetic, and autograd makes them faster than a
# closed form written in Python.
FEW_SCORES = 4096
# Of so many atoms per input feature scores are kept for the backward, so that they take at most
# twice the memory of the inputs; those of the atoms after them are recomputed.
KEEP_RATIO = 2
# Scores are made in blocks of tokens, so that large banks do not need M x N memory at once. Smaller
# blocks stay in nearer caches but pack the keys again for each; 16 MiB was the fastest of 2 to 32.
BLOCK_BYTES = 16 * 2**20


class Saved(NamedTuple):
    """What the backward needs of the forward; M tokens, all floats float32 or wider.

    index: the candidates, int32 [M, top_k], or [M, 0] when all N atoms are candidates.
    scores, weights: of the candidates [M, top_k] or [M, N]; weights before the threshold.
    norm: not yet clamped [M, 1].
    all_scores: beside an index, of the first atoms; [M, 0] where none are needed.
    """

    index: Tensor
    scores: Tensor
    weights: Tensor
    norm: Tensor
    all_scores: Tensor


def is_dense(num_atoms: int, top_k: int, macs: float) -> bool:
    """Whether all atoms are candidates, so that values are read by a dense product.

    macs: multiply-adds of that product, tokens x atoms x O.
    """
    return num_atoms <= GATHER_RATIO * top_k or macs <= DENSE_MACS


def kept_scores(num_atoms: int, width: int) -> int:
    """Of how many atoms the scores, for inputs of that width, wait for the backward."""
    return min(num_atoms, int(KEEP_RATIO * width))


def uses_gram(tokens: int, num_frozen: int, width: int) -> bool:
    """Whether x (keys^T keys) is cheaper in the backward than (x keys^T) keys with kept scores."""
    recomputed = num_frozen - kept_scores(num_frozen, width)
    return (num_frozen + tokens) * width < tokens * (recomputed + num_frozen)


def block_rows(num_atoms: int, itemsize: int) -> int:
    """Tokens per block."""
    return max(64, BLOCK_BYTES // max(1, num_atoms * itemsize))


def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
    settings: Rule,
    training: bool,
    save: bool,
    dense: bool | None = None,
) -> tuple[Tensor, Saved | None]:
    """Compute the update of the rows of x.

    Args:
        x: [M, D]; keys, values: frozen atoms [F, D], [F, O]; current_*: [C, D], [C, O], where
            F + C >= 1; residual: [M, O] or None.
        settings: (top_k, temperature, threshold, eps).
        training: if true, the threshold is not applied.
        save: whether to return what `backward` needs.
        dense: whether all atoms are candidates; None decides by `is_dense`.
    Returns:
        output [M, O], in the dtype of residual (of x without one), and `Saved` or None.
    """
    dtype = compute_dtype(x, current_keys)
    out_dtype = x.dtype if residual is None else residual.dtype
    bank = cast(dtype, keys, values, current_keys, current_values)
    if x.shape[0] == 1 and x.device.type == "cpu" and not torch.is_grad_enabled() and not save:
        added = None if residual is None else residual.to(dtype)
        output = forward_one(x.to(dtype), bank, added, settings, training)
        if output is not None:
            return output.to(out_dtype), None
    num_atoms = keys.shape[0] + current_keys.shape[0]
    if dense is None:
        dense = is_dense(num_atoms, settings[0], x.shape[0] * num_atoms * values.shape[1])
    rows = block_rows(num_atoms, dtype.itemsize)
    keep = None
    if save:
        needless = dense or uses_gram(x.shape[0], keys.shape[0], x.shape[1])
        keep = 0 if needless else kept_scores(num_atoms, x.shape[1])
    if x.shape[0] <= rows:
        (x,) = cast(dtype, x)
        output, saved = _forward_block(x, bank, residual, settings, training, keep, dense)
        return output.to(out_dtype), saved
    output = x.new_empty(x.shape[0], values.shape[1], dtype=out_dtype)
    blocks: list[Saved] = []
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        xs, res = x[part].to(dtype), None if residual is None else residual[part]
        output[part], saved = _forward_block(xs, bank, res, settings, training, keep, dense)
        if saved is not None:
            blocks.append(saved)
    if not save:
        return output, None
    return output, Saved(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def forward_one(
    x: Tensor, bank: Sequence[Tensor], residual: Tensor | None, settings: Rule, training: bool
) -> Tensor | None:
    """One token at inference, its top_k weights as Python numbers: decoding is bound by calls.

    Args:
        x: [1, D]. bank: (keys, values, current_keys, current_values). residual: [1, O] or None;
            all in one dtype, float32 or wider, on the CPU. The rest as for `forward`.
    Returns:
        [1, O], or None where the general path must decide: ties at the border, scores that are
        not finite.
    """
    keys, values, current_keys, current_values = bank
    top_k, temperature, threshold, eps = settings
    scores = all_scores(x, keys, current_keys)
    norm = torch.linalg.vector_norm(scores).item()
    top, index = scores.topk(min(top_k + 1, scores.shape[1]))
    (top,), (index,) = top.tolist(), index.tolist()
    if not math.isfinite(norm) or (len(top) > top_k and top[-1] == top[-2]):
        return None
    norm = max(norm, eps)
    shares = [math.exp((score - top[0]) / (norm * temperature)) for score in top[:top_k]]
    total = sum(shares)
    cut = -math.inf if training or threshold == 0 else norm * threshold
    num_frozen = keys.shape[0]
    rows, weights = [], []
    for score, share, atom in zip(top, shares, index, strict=False):
        if score >= cut:
            current = atom >= num_frozen
            rows.append(current_values[atom - num_frozen] if current else values[atom])
            weights.append(share / total * score)
    if not rows:
        return x.new_zeros(1, values.shape[1]) if residual is None else residual.clone()
    return _addmm(residual, x.new_tensor([weights]), torch.stack(rows))


def compute_dtype(x: Tensor, keys: Tensor) -> torch.dtype:
    """The dtype of scores, norm, softmax and sums: float32 or wider."""
    return torch.promote_types(torch.promote_types(x.dtype, keys.dtype), torch.float32)


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in a dtype."""
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _forward_block(
    x: Tensor,
    bank: Sequence[Tensor],
    residual: Tensor | None,
    settings: Rule,
    training: bool,
    keep: int | None,
    dense: bool,
) -> tuple[Tensor, Saved | None]:
    """Output and `Saved` of one block of tokens.

    keep: of how many atoms the scores are saved; None = there is no backward.
    """
    keys, values, current_keys, current_values = bank
    top_k, temperature, threshold, eps = settings
    index = hidden = None
    scores = found = all_scores(x, keys, current_keys)
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    if dense:
        hidden = _hidden(scores.detach(), top_k)
    else:
        scores, index = _select(scores, top_k)
    clamped = norm.clamp_min(eps)
    logits = scores / (clamped * temperature)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(dim=-1)
    written = weights * scores
    if not training and threshold > 0:
        written = written.masked_fill(scores < clamped * threshold, 0)
    output = _aggregate(written, index, values, current_values, residual)
    if keep is None:
        return output, None
    if index is None:
        index = x.new_empty(x.shape[0], 0, dtype=torch.int32)
    # A view of some columns would keep them all.
    found = found if keep == found.shape[1] else found[:, :keep].contiguous()
    return output, Saved(index.to(torch.int32), scores, weights, norm, found)


def joined(frozen: Tensor, current: Tensor, tokens: int) -> Tensor | None:
    """Both segments of a table as one, or None where two products cost less than the copy.

    Autograd must not see the copy.
    """
    if not current.shape[0]:
        return frozen
    if not frozen.shape[0]:
        return current
    num_atoms = frozen.shape[0] + current.shape[0]
    if torch.is_grad_enabled() or tokens < JOIN_TOKENS or 2 * tokens < num_atoms:
        return None
    return torch.cat([frozen, current])


def all_scores(x: Tensor, keys: Tensor, current_keys: Tensor) -> Tensor:
    """The scores of all atoms [M, N]; values and dy in place of keys and x give the pull."""
    table = joined(keys, current_keys, x.shape[0])
    if table is not None:
        return linear(x, table)
    return torch.cat([linear(x, keys), linear(x, current_keys)], dim=-1)


def _hidden(scores: Tensor, top_k: int) -> Tensor | None:
    """Where atoms are not selected, or None where all are."""
    if scores.shape[1] <= top_k:
        return None
    # One more than needed: equal neighbours at the border show that a tie must be broken.
    top = scores.topk(top_k + 1, dim=-1).values
    last, next_ = top[:, top_k - 1 : top_k], top[:, top_k:]
    hidden = scores < last
    tied = last == next_
    if tied.any():
        rows = tied.squeeze(-1).nonzero().squeeze(-1)
        order = scores[rows].argsort(dim=-1, descending=True, stable=True)
        hidden[rows] = torch.ones_like(hidden[rows]).scatter_(-1, order[:, :top_k], False)
    return hidden


def _select(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k scores and their atoms [M, top_k]; where scores tie, the lowest index wins."""
    # Without an order, in which torch nevertheless puts the lowest one last.
    top, index = scores.topk(top_k + 1, dim=-1, sorted=False)
    top, next_, index = top[:, :top_k].contiguous(), top[:, top_k], index[:, :top_k]
    # A tie at the border must be broken; or the last one was not the last.
    unclear = top.amin(dim=-1) <= next_
    if unclear.any():
        rows = unclear.nonzero().squeeze(-1)
        ordered, order = scores[rows].sort(dim=-1, descending=True, stable=True)
        top[rows], index[rows] = ordered[:, :top_k], order[:, :top_k]
    return top, index


def _aggregate(
    written: Tensor,
    index: Tensor | None,
    values: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """residual + sum over the candidates of written_i values_i."""
    num_frozen = values.shape[0]
    if residual is not None and residual.dtype != written.dtype:
        residual = residual.to(written.dtype)
    table = joined(values, current_values, written.shape[0])
    if index is None:
        if table is not None:
            return _addmm(residual, written, table)
        output = _addmm(residual, written[:, :num_frozen], values)
        return output.addmm_(written[:, num_frozen:], current_values)
    if table is not None:
        output = bag(table, index, written)
    else:
        output = bag(values, index, written, index < num_frozen)
        output.addmm_(
            current_part(index, written, current_values.shape[0], num_frozen), current_values
        )
    return output if residual is None else output.add_(residual)


def _addmm(residual: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if residual is None else torch.addmm(residual, a, b)


def current_part(index: Tensor, numbers: Tensor, num_current: int, num_frozen: int) -> Tensor:
    """The candidates' numbers by current atom [M, C], 0 where one is no candidate.

    Args:
        index, numbers: of the candidates [M, k]. num_current, num_frozen: C and F.
    """
    # Column 0 takes those of the frozen atoms.
    found = numbers.new_zeros(numbers.shape[0], num_current + 1)
    return found.scatter_(1, (index.long() - num_frozen + 1).clamp_(min=0), numbers)[:, 1:]


def bag(table: Tensor, index: Tensor, weights: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Weighted sum of the named rows of a table, without gathering them first.

    Args:
        table: [R, O]. index, weights: [M, k]. chosen: bool [M, k], which of them count; None = all.
    """
    rows, per_row = index.shape
    offsets = torch.arange(0, rows * per_row, per_row, dtype=index.dtype, device=index.device)
    if chosen is not None:
        counts = chosen.sum(-1, dtype=index.dtype)
        offsets = counts.cumsum(0, dtype=index.dtype) - counts
        index, weights = index[chosen], weights[chosen]
    return torch.embedding_bag(
        table, index.reshape(-1), offsets, False, 0, False, weights.reshape(-1)
    )[0]
