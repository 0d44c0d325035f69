"""The operator in the plainest torch: this file is the specification.

One function per stage, autograd for the backward, any float dtype. Speed is no concern here;
`torch_backend.py` and the kernels derive the same numbers on their own and never import this.
Half-precision inputs are scored, normalised and summed in float32 and rounded once, at the end.
"""

import torch
from torch import Tensor

from .activation import SelfActivation


def retrieve_reference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    activation: SelfActivation,
    residual: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Read a memory update for each token; the stages of `moram_kernels.retrieve`, in order.

    Args:
        x: inputs [..., D].
        keys: keys of all atoms [N, D], the frozen ones first.
        values: values of all atoms [N, O], in the same order.
        activation: `SelfActivation`.
        residual: added to the update, [..., O], or None.
        training: if true, the threshold is not applied.
    Returns:
        residual + update [..., O], in the dtype of residual (of x without one).
    """
    out_dtype = x.dtype if residual is None else residual.dtype
    scores = score_atoms(x, keys)
    norm_scores = normalize_scores(scores, activation.eps)
    selected = select_atoms(norm_scores, activation.top_k)
    weights = mixture_weights(norm_scores, selected, activation, training)
    update = aggregate_values(weights, scores, values)
    if residual is not None:
        update = residual.to(update.dtype) + update
    return update.to(out_dtype)


def score_atoms(x: Tensor, keys: Tensor) -> Tensor:
    """Raw alignment of every token with every key, [..., N], in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, keys.dtype), torch.float32)
    return x.to(dtype) @ keys.to(dtype).T


def normalize_scores(scores: Tensor, eps: float = 1e-12) -> Tensor:
    """Divide by the L2 norm over all atoms of a token, at least eps."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return scores / norm.clamp_min(eps)


def select_atoms(norm_scores: Tensor, top_k: int) -> Tensor:
    """Mark the min(top_k, N) largest signed scores; of equal ones the lowest index wins."""
    order = norm_scores.detach().argsort(dim=-1, descending=True, stable=True)
    selected = torch.zeros_like(norm_scores, dtype=torch.bool)
    return selected.scatter(-1, order[..., :top_k], True)


def mixture_weights(
    norm_scores: Tensor, selected: Tensor, activation: SelfActivation, training: bool = False
) -> Tensor:
    """Softmax over the selected atoms; at inference, cut below the threshold.

    Args:
        norm_scores: [..., N]. selected: bool [..., N]. activation: `SelfActivation`.
        training: if true, the threshold is not applied.
    Returns:
        [..., N], >= 0, of sum 1 before the cut.
    """
    logits = (norm_scores / activation.temperature).masked_fill(~selected, float("-inf"))
    weights = logits.softmax(dim=-1)
    if not training and activation.threshold > 0:
        weights = weights * (norm_scores >= activation.threshold)
    return weights


def aggregate_values(weights: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """Sum w_i s_i values_i over the atoms, [..., O]; the raw score enters again."""
    return (weights * scores) @ values.to(scores.dtype)
