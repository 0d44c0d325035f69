"""The fast path in torch calls alone, for any device: the forward pass.

Per token the work is one dense product (scores) and, for the values, only the selected atoms.
Frozen and current atoms are never concatenated, frozen atoms cost no gradient work, and only the
few scores and weights of the candidate atoms are kept for the backward.

Columns. Each token has candidates: all current atoms, then either all frozen atoms (`index` empty)
or the top_k frozen ones, whose rows `index` names. Whatever is outside the candidates has weight 0
and meets the backward (`torch_backward.py`) only through the norm.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .aliases import Rule

# All measured in float32 on one and two AMD Zen cores, top_k = 8. Above this many frozen atoms per
# selected one, a gather of the selected values beats the dense product: at 1024 tokens the dense
# one is faster with 56 frozen atoms, the gather with 152 ...
GATHER_RATIO = 12
# ... unless the dense product has fewer multiply-adds than this: then the gather's extra calls
# cost more than it saves.
DENSE_MACS = 2**22
# From this many tokens on, joining the few atoms of a dense bank costs less than two products do.
JOIN_TOKENS = 64
# Up to this many scores, calls cost more than arithmetic, and autograd makes them faster than a
# closed form written in Python.
FEW_SCORES = 4096
# Frozen scores are kept for the backward up to this many atoms (at most 1 KiB a token in float32,
# a third of an input row of 768) and recomputed above.
KEEP_SCORES = 256
# Scores are made in blocks of tokens, so that large banks do not need M x N memory at once. Smaller
# blocks stay in nearer caches but pack the keys again for each; 16 MiB was the fastest of 2 to 32.
BLOCK_BYTES = 16 * 2**20


class Saved(NamedTuple):
    """What the backward needs of the forward; M tokens, C candidates, all float32 or wider.

    index: rows of the frozen candidates, int32 [M, top_k], or [M, 0] when all are candidates.
    scores, weights: of the candidates, current ones first [M, C]; weights before the threshold.
    norm: not yet clamped [M, 1].
    frozen_scores: [M, N_frozen], or [M, 0] where they are recomputed.
    """

    index: Tensor
    scores: Tensor
    weights: Tensor
    norm: Tensor
    frozen_scores: Tensor


def is_dense(num_frozen: int, top_k: int, macs: float) -> bool:
    """Whether all frozen atoms are candidates, so that values are read by a dense product.

    macs: multiply-adds of that product, tokens x frozen atoms x O.
    """
    return num_frozen <= GATHER_RATIO * top_k or macs <= DENSE_MACS


def block_rows(num_frozen: int, itemsize: int) -> int:
    """Tokens per block."""
    return max(64, BLOCK_BYTES // max(1, num_frozen * itemsize))


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
        dense: whether all frozen atoms are candidates; None decides by `is_dense`.
    Returns:
        output [M, O], in the dtype of residual (of x without one), and `Saved` or None.
    """
    dtype = compute_dtype(x, current_keys)
    out_dtype = x.dtype if residual is None else residual.dtype
    bank = cast(dtype, keys, values, current_keys, current_values)
    if x.shape[0] == 1 and x.device.type == "cpu" and not torch.is_grad_enabled() and not save:
        (row,) = cast(dtype, x)
        output = _forward_one(row, bank, residual, settings, training)
        if output is not None:
            return output.to(out_dtype), None
    if dense is None:
        dense = is_dense(keys.shape[0], settings[0], x.shape[0] * values.numel())
    rows = block_rows(keys.shape[0], dtype.itemsize)
    if x.shape[0] <= rows:
        (x,) = cast(dtype, x)
        output, saved = _forward_block(x, bank, residual, settings, training, save, dense)
        return output.to(out_dtype), saved
    output = x.new_empty(x.shape[0], values.shape[1], dtype=out_dtype)
    blocks: list[Saved] = []
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        xs, res = x[part].to(dtype), None if residual is None else residual[part]
        output[part], saved = _forward_block(xs, bank, res, settings, training, save, dense)
        if saved is not None:
            blocks.append(saved)
    if not save:
        return output, None
    return output, Saved(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _forward_one(
    x: Tensor, bank: Sequence[Tensor], residual: Tensor | None, settings: Rule, training: bool
) -> Tensor | None:
    """One token at inference, its top_k weights as Python numbers: decoding is bound by calls.

    Returns None where the general path must decide: ties at the border, scores that are not finite.
    """
    keys, values, current_keys, current_values = bank
    top_k, temperature, threshold, eps = settings
    scores = _dense_scores(x, keys, current_keys)
    norm = torch.linalg.vector_norm(scores).item()
    top, index = scores.topk(min(top_k + 1, scores.shape[1]))
    (top,), (index,) = top.tolist(), index.tolist()
    if not math.isfinite(norm) or (len(top) > top_k and top[-1] == top[-2]):
        return None
    norm = max(norm, eps)
    shares = [math.exp((score - top[0]) / (norm * temperature)) for score in top[:top_k]]
    total = sum(shares)
    cut = -math.inf if training or threshold == 0 else norm * threshold
    output = (
        x.new_zeros(1, values.shape[1]) if residual is None else residual.to(x.dtype, copy=True)
    )
    num_current = current_keys.shape[0]
    for score, share, column in zip(top, shares, index, strict=False):
        if score >= cut:
            table, row = (
                (values, column - num_current)
                if column >= num_current
                else (current_values, column)
            )
            output.add_(table[row], alpha=share / total * score)
    return output


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
    save: bool,
    dense: bool,
) -> tuple[Tensor, Saved | None]:
    keys, values, current_keys, current_values = bank
    top_k, temperature, threshold, eps = settings
    num_frozen, num_current = keys.shape[0], current_keys.shape[0]
    index = frozen_scores = None
    if dense:
        scores = _dense_scores(x, keys, current_keys)
        norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
        hidden = _hidden_dense(scores.detach(), num_current, top_k)
    else:
        frozen_scores = x @ keys.t()
        norm = torch.linalg.vector_norm(frozen_scores, dim=-1, keepdim=True)
        if num_current:
            current_scores = x @ current_keys.t()
            wide = torch.linalg.vector_norm(current_scores, dim=-1, keepdim=True)
            norm = torch.hypot(norm, wide)
        else:
            current_scores = x.new_empty(x.shape[0], 0)
        scores, hidden, index = _select_sparse(current_scores, frozen_scores, top_k)
    clamped = norm.clamp_min(eps)
    logits = scores / (clamped * temperature)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(dim=-1)
    written = weights * scores
    if not training and threshold > 0:
        written = written.masked_fill(scores < clamped * threshold, 0)
    output = _aggregate(written, index, values, current_values, residual)
    if not save:
        return output, None
    no_index, no_scores = x.new_empty(x.shape[0], 0, dtype=torch.int32), x.new_empty(x.shape[0], 0)
    return output, Saved(
        no_index if index is None else index.to(torch.int32),
        scores,
        weights,
        norm,
        no_scores if frozen_scores is None or num_frozen > KEEP_SCORES else frozen_scores,
    )


def joins(tokens: int) -> bool:
    """Whether to copy a dense bank's two segments into one, which autograd must not see."""
    return tokens >= JOIN_TOKENS and not torch.is_grad_enabled()


def _dense_scores(x: Tensor, keys: Tensor, current_keys: Tensor) -> Tensor:
    if keys.shape[0] == 0:
        return x @ current_keys.t()
    if current_keys.shape[0] == 0:
        return x @ keys.t()
    if joins(x.shape[0]):
        return x @ torch.cat([current_keys, keys]).t()
    return torch.cat([x @ current_keys.t(), x @ keys.t()], dim=-1)


def _hidden_dense(scores: Tensor, num_current: int, top_k: int) -> Tensor | None:
    """Where atoms are not selected, or None where all are; columns: current, then frozen."""
    if scores.shape[1] <= top_k:
        return None
    # One more than needed: equal neighbours at the border show that a tie must be broken.
    top = scores.topk(top_k + 1, dim=-1).values
    last, next_ = top[:, top_k - 1 : top_k], top[:, top_k:]
    hidden = scores < last
    tied = last == next_
    if tied.any():
        rows = tied.squeeze(-1).nonzero().squeeze(-1)
        hidden[rows] = ~_first_selected(scores[rows], num_current, top_k)
    return hidden


def _first_selected(scores: Tensor, num_current: int, top_k: int) -> Tensor:
    """Selected atoms where scores tie: frozen before current, then the lowest index."""
    in_order = scores.roll(-num_current, dims=-1)
    order = in_order.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return keep.roll(num_current, dims=-1)


def _select_sparse(
    current_scores: Tensor, frozen_scores: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate scores, where they are not selected, and the rows of the frozen ones."""
    num_current = current_scores.shape[1]
    order, index = frozen_scores.topk(top_k + 1, dim=-1)
    index = index[:, :top_k]
    if num_current:
        wide = torch.cat([current_scores, order], dim=-1)
        order = wide.topk(top_k + 1, dim=-1).values
        scores = wide[:, :-1]
    else:
        scores = order[:, :top_k]
    last, next_ = order[:, top_k - 1 : top_k], order[:, top_k:]
    hidden = scores < last
    tied = last == next_
    if tied.any():
        rows = tied.squeeze(-1).nonzero().squeeze(-1)
        ordered, first = frozen_scores[rows].sort(dim=-1, descending=True, stable=True)
        part = torch.cat([current_scores[rows], ordered[:, :top_k]], dim=-1)
        scores, index = scores.clone(), index.clone()
        scores[rows], index[rows] = part, first[:, :top_k]
        hidden[rows] = ~_first_selected(part, num_current, top_k)
    return scores, hidden, index


def _aggregate(
    written: Tensor,
    index: Tensor | None,
    values: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """residual + sum over the candidates of written_i values_i."""
    num_current = current_values.shape[0]
    if residual is not None and residual.dtype != written.dtype:
        residual = residual.to(written.dtype)
    if num_current == 0:
        if index is None:
            return _addmm(residual, written, values)
        output = bag(values, index, written)
        return output if residual is None else output.add_(residual)
    if values.shape[0] == 0:
        return _addmm(residual, written, current_values)
    if index is None and joins(written.shape[0]):
        return _addmm(residual, written, torch.cat([current_values, values]))
    output = _addmm(residual, written[:, :num_current], current_values)
    frozen = written[:, num_current:]
    return (
        output.addmm_(frozen, values) if index is None else output.add_(bag(values, index, frozen))
    )


def _addmm(residual: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if residual is None else torch.addmm(residual, a, b)


def bag(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the named rows of a table, without gathering them first."""
    rows, per_row = index.shape
    offsets = torch.arange(0, rows * per_row, per_row, dtype=index.dtype, device=index.device)
    return torch.embedding_bag(
        table, index.reshape(-1), offsets, False, 0, False, weights.reshape(-1)
    )[0]
