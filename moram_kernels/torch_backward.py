"""The closed-form backward of the torch backend; columns as in `torch_backend.py`.

With g_i = <values_i, dy>, z the normalised scores and dz their gradient through the softmax,

    ds = w g + dz / n   on the candidates,   ds -= s <z, dz> / n^2   on every atom,

where n = max(||s||, eps) and the second term is absent where the clamp is active. Frozen atoms get
no gradient; they only carry ds back to x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import torch_backend
from .aliases import Gradients, Rule
from .torch_backend import Saved, bag, cast, compute_dtype


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    saved: Saved,
    settings: Rule,
    training: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of the update for x and the current atoms.

    Args:
        grad: gradient of the output [M, O].
        saved: what `forward` returned for the same arguments.
        needs: which of (x, current_keys, current_values) want a gradient.
    Returns:
        dx [M, D], dkeys [C, D], dvalues [C, O], each in the dtype of its tensor or None.
    """
    dtype = compute_dtype(x, current_keys)
    bank = cast(dtype, keys, values, current_keys, current_values)
    rows = torch_backend.block_rows(keys.shape[0], dtype.itemsize)
    sparse = saved.index.shape[1] > 0
    gram = _gram(bank[0], x.shape[0]) if needs[0] and sparse else None
    if x.shape[0] <= rows:
        xs, dy = cast(dtype, x, grad)
        grads = list(_backward_block(dy, xs, bank, saved, settings, training, needs, gram))
    else:
        parts: list[Tensor] = []
        grads: list[Tensor | None] = [None, None, None]
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            block = Saved(*(t[part] for t in saved))
            xs, dy = x[part].to(dtype), grad[part].to(dtype)
            dx, *dbank = _backward_block(dy, xs, bank, block, settings, training, needs, gram)
            if dx is not None:
                parts.append(dx.to(x.dtype))
            for i, part_grad in enumerate(dbank, start=1):
                total = grads[i]
                if part_grad is not None:
                    grads[i] = part_grad if total is None else total.add_(part_grad)
        grads[0] = torch.cat(parts) if needs[0] else None
    targets = (x, current_keys, current_values)
    pairs = zip(grads, targets, strict=True)
    dx, dkeys, dvalues = (None if g is None else g.to(t.dtype) for g, t in pairs)
    return dx, dkeys, dvalues


def _gram(keys: Tensor, tokens: int) -> Tensor | None:
    """keys^T keys if it makes (x keys^T) keys cheaper than recomputing the scores, else None."""
    num_frozen, width = keys.shape
    if num_frozen <= torch_backend.KEEP_SCORES:
        return None
    with_gram = num_frozen * width * width + tokens * width * width
    return keys.t() @ keys if with_gram < 2 * tokens * num_frozen * width else None


def _backward_block(
    dy: Tensor,
    x: Tensor,
    bank: Sequence[Tensor],
    saved: Saved,
    settings: Rule,
    training: bool,
    needs: Sequence[bool],
    gram: Tensor | None,
) -> Gradients:
    """dx, dkeys, dvalues of one block of tokens, None where not needed."""
    keys, values, current_keys, current_values = bank
    _, temperature, threshold, eps = settings
    scores, weights, num_current = saved.scores, saved.weights, current_keys.shape[0]
    sparse = saved.index.shape[1] > 0
    clamped = saved.norm.clamp_min(eps)
    pull = _pull(dy, values, current_values, saved.index)
    written = weights * scores
    if not training and threshold > 0:
        silent = scores < clamped * threshold
        pull, written = pull.masked_fill(silent, 0), written.masked_fill(silent, 0)
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


def _pull(dy: Tensor, values: Tensor, current_values: Tensor, index: Tensor) -> Tensor:
    """<values_i, dy> for the candidates."""
    if values.shape[0] == 0:
        return dy @ current_values.t()
    if index.shape[1] == 0 and torch_backend.joins(dy.shape[0]):
        return dy @ torch.cat([current_values, values]).t()
    current = dy @ current_values.t()
    frozen = _bag_pull(dy, values, index) if index.shape[1] else dy @ values.t()
    return torch.cat([current, frozen], dim=-1)


def _bag_pull(dy: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """<values_i, dy> for the named rows [M, top_k]: the bag's own gradient for its weights."""
    rows, per_row = index.shape
    row = torch.arange(rows, dtype=index.dtype, device=index.device)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy, values, index.reshape(-1), row * per_row, row.repeat_interleave(per_row), 0
    )
    return flat.view(rows, per_row)


def _dx(
    x: Tensor,
    keys: Tensor,
    current_keys: Tensor,
    saved: Saved,
    dscores: Tensor,
    dense: Tensor,
    gram: Tensor | None,
) -> Tensor:
    num_current = current_keys.shape[0]
    if keys.shape[0] == 0:
        return dscores @ current_keys
    if saved.index.shape[1] == 0 and torch_backend.joins(x.shape[0]):
        return dscores @ torch.cat([current_keys, keys])
    frozen = dscores[:, num_current:]
    if saved.index.shape[1] == 0:
        dx = frozen @ keys
    elif gram is not None:
        dx = ((x * -dense) @ gram).add_(bag(keys, saved.index, frozen))
    else:
        kept = saved.frozen_scores if saved.frozen_scores.shape[1] else x @ keys.t()
        full = (kept * -dense).scatter_add_(1, saved.index.long(), frozen)
        dx = full @ keys
    return dx.addmm_(dscores[:, :num_current], current_keys) if num_current else dx
