"""The fast path in torch calls alone, for any device: forward and closed-form backward.

Per token the work is one dense product (scores) and, for the values, only the selected atoms.
Frozen and current atoms are never concatenated, frozen atoms cost no gradient work, and only the
few scores and weights of the candidate atoms are kept for the backward.

Columns. Each token has candidates: all current atoms, then either all frozen atoms (`index` empty)
or the top_k frozen ones, whose rows `index` names. Whatever is outside the candidates has weight 0
and meets the backward only through the norm: with dz the gradient of the normalised scores,

    ds = w g + dz / n   on the candidates,   ds -= s <z, dz> / n^2   on every atom,

where n = max(||s||, eps) and the second term is absent where the clamp is active.
"""

import math
from typing import NamedTuple

import torch

# Above this many frozen atoms per selected one, a gather of the selected values beats the dense
# product. Measured on 2 CPU cores, float32, O = 768 and 2048, top_k = 8: the gather costs as much
# as a product with about 20 to 40 atoms.
GATHER_RATIO = 4
# With so few scores in all, calls cost more than arithmetic and the dense form has fewer of them.
FEW_SCORES = 512
# Frozen scores are kept for the backward up to this many atoms (at most 1 KiB a token in float32,
# a third of an input row of 768) and recomputed above.
KEEP_SCORES = 256
# A block of scores should stay in the caches between the passes over it.
BLOCK_BYTES = 4 * 2**20


class Saved(NamedTuple):
    """What the backward needs of the forward; M tokens, C candidates, all float32 or wider.

    index: rows of the frozen candidates, int32 [M, top_k], or [M, 0] when all are candidates.
    scores, weights: of the candidates, current ones first [M, C]; weights before the threshold.
    norm: not yet clamped [M, 1].
    frozen_scores: [M, N_frozen], or [M, 0] where they are recomputed.
    """

    index: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    norm: torch.Tensor
    frozen_scores: torch.Tensor


def is_dense(num_frozen, top_k, tokens):
    """Whether all frozen atoms are candidates, so that values are read by a dense product."""
    return num_frozen <= GATHER_RATIO * top_k or tokens * num_frozen <= FEW_SCORES


def block_rows(num_frozen, itemsize):
    """Tokens per block."""
    return max(64, BLOCK_BYTES // max(1, num_frozen * itemsize))


def forward(
    x, keys, values, current_keys, current_values, residual, settings, training, save, dense=None
):
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
    bank = _to(dtype, keys, values, current_keys, current_values)
    if x.shape[0] == 1 and x.device.type == "cpu" and not torch.is_grad_enabled() and not save:
        output = _forward_one(*_to(dtype, x), bank, residual, settings, training)
        if output is not None:
            return output.to(out_dtype), None
    if dense is None:
        dense = is_dense(keys.shape[0], settings[0], x.shape[0])
    rows = block_rows(keys.shape[0], dtype.itemsize)
    if x.shape[0] <= rows:
        (x,) = _to(dtype, x)
        output, saved = _forward_block(x, bank, residual, settings, training, save, dense)
        return output.to(out_dtype), saved
    output = x.new_empty(x.shape[0], values.shape[1], dtype=out_dtype)
    blocks = []
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        xs, res = x[part].to(dtype), None if residual is None else residual[part]
        output[part], saved = _forward_block(xs, bank, res, settings, training, save, dense)
        blocks.append(saved)
    if not save:
        return output, None
    return output, Saved(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _forward_one(x, bank, residual, settings, training):
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


def compute_dtype(x, keys):
    """The dtype of scores, norm, softmax and sums: float32 or wider."""
    return torch.promote_types(torch.promote_types(x.dtype, keys.dtype), torch.float32)


def _to(dtype, *tensors):
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _forward_block(x, bank, residual, settings, training, save, dense):
    keys, values, current_keys, current_values = bank
    top_k, temperature, threshold, eps = settings
    num_frozen, num_current = keys.shape[0], current_keys.shape[0]
    index = frozen_scores = None
    if dense:
        scores = _dense_scores(x, keys, current_keys)
        norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
        hidden = _hidden_dense(scores.detach(), num_current, top_k)
    else:
        frozen_scores = matmul_nt(x, keys)
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
        written *= scores >= clamped * threshold
    output = _aggregate(written, index, values, current_values, residual)
    if not save:
        return output, None
    no_index, no_scores = x.new_empty(x.shape[0], 0, dtype=torch.int32), x.new_empty(x.shape[0], 0)
    return output, Saved(
        no_index if index is None else index.to(torch.int32),
        scores,
        weights,
        norm,
        frozen_scores if index is not None and num_frozen <= KEEP_SCORES else no_scores,
    )


def _dense_scores(x, keys, current_keys):
    if keys.shape[0] == 0:
        return x @ current_keys.t()
    if current_keys.shape[0] == 0:
        return x @ keys.t()
    return torch.cat([x @ current_keys.t(), x @ keys.t()], dim=-1)


def matmul_nt(a, b):
    """a @ b.T for a [M, D], b [N, D] or b = c.T; in float32 on CPU through oneDNN where it pays.

    oneDNN's float32 product is 1.1 to 1.4 times as fast as MKL's on the AMD cores measured, and the
    same on others, but falls to a slow path for rows that are not contiguous.
    """
    if a.dtype == torch.float32 and a.device.type == "cpu" and _HAS_ONEDNN and a.shape[0] >= 64:
        if not (b.is_contiguous() or b.t().is_contiguous()):
            b = b.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b, None, "none", [], "")
    return a @ b.t()


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def _hidden_dense(scores, num_current, top_k):
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


def _first_selected(scores, num_current, top_k):
    """Selected atoms where scores tie: frozen before current, then the lowest index."""
    in_order = scores.roll(-num_current, dims=-1)
    order = in_order.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return keep.roll(num_current, dims=-1)


def _select_sparse(current_scores, frozen_scores, top_k):
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


def _aggregate(written, index, values, current_values, residual):
    """residual + sum over the candidates of written_i values_i."""
    num_current = current_values.shape[0]
    if residual is not None and residual.dtype != written.dtype:
        residual = residual.to(written.dtype)
    if num_current == 0:
        if index is None:
            return _addmm(residual, written, values)
        output = _bag(values, index, written)
        return output if residual is None else output.add_(residual)
    if values.shape[0] == 0:
        return _addmm(residual, written, current_values)
    output = _addmm(residual, written[:, :num_current], current_values)
    frozen = written[:, num_current:]
    return (
        output.addmm_(frozen, values) if index is None else output.add_(_bag(values, index, frozen))
    )


def _addmm(residual, a, b):
    return a @ b if residual is None else torch.addmm(residual, a, b)


def _bag(table, index, weights):
    """Weighted sum of the named rows of a table, without gathering them first."""
    rows, per_row = index.shape
    offsets = torch.arange(0, rows * per_row, per_row, dtype=index.dtype, device=index.device)
    return torch.embedding_bag(
        table, index.reshape(-1), offsets, False, 0, False, weights.reshape(-1)
    )[0]


def backward(grad, x, keys, values, current_keys, current_values, saved, settings, training, needs):
    """Gradients of the update for x and the current atoms.

    Args:
        grad: gradient of the output [M, O].
        saved: what `forward` returned for the same arguments.
        needs: which of (x, current_keys, current_values) want a gradient.
    Returns:
        dx [M, D], dkeys [C, D], dvalues [C, O], each in the dtype of its tensor or None.
    """
    dtype = compute_dtype(x, current_keys)
    bank = _to(dtype, keys, values, current_keys, current_values)
    rows = block_rows(keys.shape[0], dtype.itemsize)
    sparse = saved.index.shape[1] > 0
    gram = _gram(bank[0], x.shape[0]) if needs[0] and sparse else None
    if x.shape[0] <= rows:
        xs, dy = _to(dtype, x, grad)
        grads = _backward_block(dy, xs, bank, saved, settings, training, needs, gram)
    else:
        parts, grads = [], [None, None, None]
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            block = Saved(*(t[part] for t in saved))
            xs, dy = x[part].to(dtype), grad[part].to(dtype)
            dx, *dbank = _backward_block(dy, xs, bank, block, settings, training, needs, gram)
            parts.append(None if dx is None else dx.to(x.dtype))
            for i, part_grad in enumerate(dbank, start=1):
                if part_grad is not None:
                    grads[i] = part_grad if grads[i] is None else grads[i].add_(part_grad)
        grads[0] = torch.cat(parts) if needs[0] else None
    targets = (x, current_keys, current_values)
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, targets, strict=True))


def _gram(keys, tokens):
    """keys^T keys if it makes (x keys^T) keys cheaper than recomputing the scores, else None."""
    num_frozen, width = keys.shape
    if num_frozen <= KEEP_SCORES:
        return None
    with_gram = num_frozen * width * width + tokens * width * width
    return matmul_nt(keys.t(), keys.t()) if with_gram < 2 * tokens * num_frozen * width else None


def _backward_block(dy, x, bank, saved, settings, training, needs, gram):
    """dx, dkeys, dvalues of one block of tokens, None where not needed."""
    keys, values, current_keys, current_values = bank
    _, temperature, threshold, eps = settings
    scores, weights, num_current = saved.scores, saved.weights, current_keys.shape[0]
    sparse = saved.index.shape[1] > 0
    clamped = saved.norm.clamp_min(eps)
    pull = _pull(dy, values, current_values, saved.index)
    written = weights * scores
    if not training and threshold > 0:
        fires = scores >= clamped * threshold
        pull, written = pull * fires, written * fires
    # Through the softmax: the weight's gradient is s g, and dnorm_scores = w (dw - <w, dw>) / t.
    share = written * pull
    dnorm_scores = torch.addcmul(share, weights, share.sum(-1, keepdim=True), value=-1)
    dnorm_scores /= clamped * temperature
    dense = (dnorm_scores * scores).sum(-1, keepdim=True) / clamped / clamped
    dense.masked_fill_(saved.norm < eps, 0)
    dscores = torch.addcmul(dnorm_scores, weights, pull)
    if sparse:
        dscores[:, :num_current].addcmul_(scores[:, :num_current], dense, value=-1)
    else:
        dscores.addcmul_(scores, dense, value=-1)
    current = dscores[:, :num_current]
    return (
        _dx(x, keys, current_keys, saved, dscores, dense, gram) if needs[0] else None,
        current.t() @ x if needs[1] else None,
        written[:, :num_current].t() @ dy if needs[2] else None,
    )


def _pull(dy, values, current_values, index):
    """<values_i, dy> for the candidates."""
    current = dy @ current_values.t()
    if values.shape[0] == 0:
        return current
    frozen = _bag_pull(dy, values, index) if index.shape[1] else dy @ values.t()
    return torch.cat([current, frozen], dim=-1)


def _bag_pull(dy, values, index):
    """<values_i, dy> for the named rows [M, top_k]: the bag's own gradient for its weights."""
    rows, per_row = index.shape
    bag = torch.arange(rows, dtype=index.dtype, device=index.device)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy, values, index.reshape(-1), bag * per_row, bag.repeat_interleave(per_row), 0
    )
    return flat.view(rows, per_row)


def _dx(x, keys, current_keys, saved, dscores, dense, gram):
    num_current = current_keys.shape[0]
    if keys.shape[0] == 0:
        return dscores @ current_keys
    frozen = dscores[:, num_current:]
    if saved.index.shape[1] == 0:
        dx = frozen @ keys
    elif gram is not None:
        dx = matmul_nt(x * -dense, gram).add_(_bag(keys, saved.index, frozen))
    else:
        kept = saved.frozen_scores if saved.frozen_scores.shape[1] else matmul_nt(x, keys)
        full = (kept * -dense).scatter_add_(1, saved.index.long(), frozen)
        dx = matmul_nt(full, keys.t())
    return dx.addmm_(dscores[:, :num_current], current_keys) if num_current else dx
