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
    num_atoms = keys.shape[0] + current_keys.shape[0]
    rows = torch_backend.block_rows(num_atoms, dtype.itemsize)
    sparse = saved.index.shape[1] > 0
    gram = None
    if needs[0] and sparse and torch_backend.uses_gram(x.shape[0], keys.shape[0], x.shape[1]):
        gram = bank[0].t() @ bank[0]
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
    scores, weights, index = saved.scores, saved.weights, saved.index
    num_frozen, num_current = keys.shape[0], current_keys.shape[0]
    sparse = index.shape[1] > 0
    clamped = saved.norm.clamp_min(eps)
    pull = _pull(dy, values, current_values, index)
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

    def by_current(numbers: Tensor) -> Tensor:
        if sparse:
            return torch_backend.current_part(index, numbers, num_current, num_frozen)
        return numbers[:, num_frozen:]

    if not sparse:
        dscores.addcmul_(scores, dense, value=-1)
        current = by_current(dscores)
    elif needs[0] and gram is None:
        found, kept = saved.all_scores, saved.all_scores.shape[1]
        if kept < num_frozen + num_current:
            rest = keys[kept:], current_keys[max(0, kept - num_frozen) :]
            found = torch.cat([found, torch_backend.all_scores(x, *rest)], dim=-1)
        dscores = (found * -dense).scatter_add_(1, index.long(), dscores)
        current = dscores[:, num_frozen:]
    else:
        current = by_current(dscores).addcmul(x @ current_keys.t(), dense, value=-1)
    dx = None
    if needs[0] and gram is not None:
        dx = ((x * -dense) @ gram).add_(bag(keys, index, dscores, index < num_frozen))
        dx.addmm_(current, current_keys)
    elif needs[0]:
        table = torch_backend.joined(keys, current_keys, x.shape[0])
        if table is not None:
            dx = dscores @ table
        else:
            dx = (dscores[:, :num_frozen] @ keys).addmm_(current, current_keys)
    return (
        dx,
        current.t() @ x if needs[1] else None,
        by_current(written).t() @ dy if needs[2] else None,
    )


def _pull(dy: Tensor, values: Tensor, current_values: Tensor, index: Tensor) -> Tensor:
    """<values_i, dy> for the candidates."""
    if not index.shape[1]:
        return torch_backend.all_scores(dy, values, current_values)
    table = torch_backend.joined(values, current_values, dy.shape[0])
    if table is not None:
        return _bag_pull(dy, table, index)
    num_frozen = values.shape[0]
    frozen = _bag_pull(dy, values, index.clamp(max=num_frozen - 1))
    column = (index.long() - num_frozen).clamp_(min=0)
    return torch.where(index < num_frozen, frozen, (dy @ current_values.t()).gather(1, column))


def _bag_pull(dy: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """<values_i, dy> for the named rows [M, top_k]: the bag's own gradient for its weights."""
    rows, per_row = index.shape
    row = torch.arange(rows, dtype=index.dtype, device=index.device)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy, values, index.reshape(-1), row * per_row, row.repeat_interleave(per_row), 0
    )
    return flat.view(rows, per_row)
