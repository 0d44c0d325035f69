"""The straightforward adapter that speed claims are measured against.

What published code does per call, in ordinary torch: concatenate the frozen and the current atoms,
score, normalise densely, top-k, scatter into a tensor of -inf, softmax over all atoms, threshold,
second dense product. Autograd does the backward, also for the frozen atoms that were concatenated.
Values are kept as [O, N], the layout of a LoRA `B`, which is what that code stores.
"""

import torch
import torch.nn.functional as F


def plain_update(
    x,
    keys,
    values_t,
    current_keys,
    current_values_t,
    residual,
    *,
    top_k,
    temperature,
    threshold,
    training,
):
    """residual + update; x [..., D], keys [F, D], values_t [O, F], current_* [C, D] and [O, C]."""
    all_keys = torch.cat([keys, current_keys], dim=0)
    all_values_t = torch.cat([values_t, current_values_t], dim=1)
    scores = F.linear(x, all_keys)
    norm_scores = F.normalize(scores, dim=-1)
    top, index = norm_scores.topk(min(top_k, norm_scores.shape[-1]), dim=-1)
    masked = torch.full_like(norm_scores, float("-inf")).scatter(-1, index, top)
    weights = torch.softmax(masked / temperature, dim=-1)
    if not training and threshold > 0:
        weights = weights * (norm_scores >= threshold)
    return residual + F.linear(weights * scores, all_values_t)
