"""Recognises task heads that no pretraining has touched. A leaf."""

from collections.abc import Container

import torch
from torch import nn

# Last parts of the names that common libraries give to heads.
_NAMES = ("head", "heads", "fc", "score", "classifier", "classification_head", "qa_outputs")


def fresh_heads(model: nn.Module, adapted: Container[nn.Module] = ()) -> tuple[str, ...]:
    """Paths of Linears that are heads and whose weights look as they were drawn.

    A head is named like one, or lies outside the backbone of a Hugging Face model; output
    embeddings are none. Drawn weights have the spread of their initialisation, which training
    changes; the smaller the head, the less sure is that.

    Args:
        model: without wrappers around the whole of it.
        adapted: modules that get adapters.
    """
    prefix = getattr(model, "base_model_prefix", "")
    outside = bool(prefix) and hasattr(model, prefix)
    get_embeddings = getattr(model, "get_output_embeddings", None)
    embeddings = get_embeddings() if get_embeddings is not None else None
    found = []
    for path, module in model.named_modules():
        named = any(part in _NAMES for part in path.split(".")[-2:])
        if not named and not (outside and path and not f"{path}.".startswith(f"{prefix}.")):
            continue
        if type(module) is nn.Linear and module is not embeddings and module not in adapted:
            spread = getattr(getattr(model, "config", None), "initializer_range", None)
            if _looks_drawn(module, spread):
                found.append(path)
    return tuple(found)


@torch.no_grad()
def _looks_drawn(linear: nn.Linear, spread: object) -> bool:
    """Whether weights have the spread of an initialisation, to four of its standard errors."""
    weight, bias = linear.weight, linear.bias
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return False
    if not weight.any():
        return True
    uniform = 1 / linear.in_features**0.5
    deviation = float(weight.float().square().mean().sqrt())
    wide = 4 / (2 * weight.numel()) ** 0.5
    if weight.abs().max() <= uniform * 1.01 and abs(deviation / uniform * 3**0.5 - 1) < wide:
        return True
    drawn = isinstance(spread, float) and spread > 0 and abs(deviation / spread - 1) < wide
    return bool(drawn and (bias is None or not bias.any()))
