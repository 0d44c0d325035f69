"""The Triton backend as opaque ops, `torch.ops.moram.retrieve_fused` and `.._backward`.

Their shapes depend on the capacity of the bank, never on how many of its atoms are live. On a
device without kernels they run the torch backend, so that a graph made for a GPU also runs on a
CPU. Who calls them: `fused_ops.py`.
"""

import torch
from torch import Tensor

from . import torch_backend, torch_backward
from .aliases import Bank, Gradients, Rule
from .fused_ops import run_backward, run_forward
from .ops import TAGS, check_live, fake_backward, padded
from .triton_backend import available
from .triton_backend.plan import fixed_form, saved_shapes

_LIBRARY = torch.library.Library("moram", "FRAGMENT")
_BANK = "Tensor keys, Tensor values, Tensor current_keys, Tensor current_values"
_SETTINGS = "int top_k, float temperature, float threshold, float eps, bool training"
_SAVED = "Tensor index, Tensor picked, Tensor scores, Tensor stats"
_LIBRARY.define(
    f"retrieve_fused(Tensor x, {_BANK}, Tensor? residual, Tensor num_frozen, {_SETTINGS}, "
    "str precision, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_LIBRARY.define(
    f"retrieve_fused_backward(Tensor grad, Tensor x, {_BANK}, {_SAVED}, Tensor num_frozen, "
    f"{_SETTINGS}, str precision) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _retrieve_fused(
    x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor, current_values: Tensor,
    residual: Tensor | None, num_frozen: Tensor, top_k: int, temperature: float, threshold: float,
    eps: float, training: bool, precision: str, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    count, settings = int(num_frozen), Rule(top_k, temperature, threshold, eps)
    check_live(count, keys)
    bank = Bank(keys[:count], values[:count], current_keys, current_values)
    form = _fixed_form(keys, current_keys, top_k) if save else None
    wanted = _kept(x, keys, current_keys, top_k, form)
    with torch.autocast(x.device.type, enabled=False):
        if available.why_not(x.device):
            how = (residual, settings, training, False)
            output = torch_backend.forward(x, *bank, *how)[0]
            return output, *(x.new_zeros(s, dtype=d) for s, d in wanted)
        output, saved, _ = run_forward(x, bank, residual, settings, training, precision, form)
    if saved is None:
        return output, *(x.new_empty(s, dtype=d) for s, d in wanted)
    # What the kernels left unwritten becomes zeros: an op must give the same every time.
    index, picked, scores, stats = saved
    if form == "dense":
        scores = scores[:, : count + current_keys.shape[0]]
    else:
        stats = stats[:1]
    filled = (index, picked, scores, stats)
    return output, *(padded(t, *shape) for t, (shape, _) in zip(filled, wanted, strict=True))


def _fixed_form(keys: Tensor, current_keys: Tensor, top_k: int) -> str:
    return fixed_form(keys.shape[0], current_keys.shape[0], keys.shape[1], top_k)


def _kept(
    x: Tensor, keys: Tensor, current_keys: Tensor, top_k: int, form: str | None
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """(shape, dtype) of every tensor an op keeps for its backward."""
    dtypes = (torch.int32, torch.float32, torch.float32, torch.float32)
    if form is None:
        return tuple(((0,), dtype) for dtype in dtypes)
    current = current_keys.shape[0]
    shapes = saved_shapes(x.shape[0], keys.shape[0] + current, current, top_k, form)
    return tuple(zip(shapes, dtypes, strict=True))


def _retrieve_fused_fake(
    x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor, current_values: Tensor,
    residual: Tensor | None, num_frozen: Tensor, top_k: int, temperature: float, threshold: float,
    eps: float, training: bool, precision: str, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = x.dtype if residual is None else residual.dtype
    form = _fixed_form(keys, current_keys, top_k) if save else None
    kept = _kept(x, keys, current_keys, top_k, form)
    return (
        x.new_empty(x.shape[0], values.shape[1], dtype=dtype),
        *(x.new_empty(s, dtype=d) for s, d in kept),
    )


def _retrieve_fused_backward(
    grad: Tensor, x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor,
    current_values: Tensor, index: Tensor, picked: Tensor, scores: Tensor, stats: Tensor,
    num_frozen: Tensor, top_k: int, temperature: float, threshold: float, eps: float,
    training: bool, precision: str,
) -> Gradients:  # fmt: skip
    count, settings = int(num_frozen), Rule(top_k, temperature, threshold, eps)
    bank = Bank(keys[:count], values[:count], current_keys, current_values)
    form, live = _fixed_form(keys, current_keys, top_k), count + current_keys.shape[0]
    if form == "lists":
        index, picked = (t[:, : min(top_k, live)].contiguous() for t in (index, picked))
    with torch.autocast(x.device.type, enabled=False):
        if available.why_not(x.device):
            saved = torch_backend.forward(x, *bank, None, settings, training, True)[1]
            assert saved is not None
            needs = (True, True, True)
            return torch_backward.backward(grad, x, *bank, saved, settings, training, needs)
        saved, needs = (index, picked, scores, stats), (True, True)
        dx, dkeys, dvalues = run_backward(
            grad, x, bank, saved, settings, training, precision, needs, form
        )
    # Both gradients of the bank come in one buffer, which results of an op may not share.
    grads = (dx, dkeys, None if dvalues is None else dvalues.clone())
    likes = (x, current_keys, current_values)
    pairs = zip(grads, likes, strict=True)
    dx, dkeys, dvalues = (t.new_zeros(t.shape) if g is None else g for g, t in pairs)
    return dx, dkeys, dvalues


for _name, _impl, _fake in (
    ("retrieve_fused", _retrieve_fused, _retrieve_fused_fake),
    ("retrieve_fused_backward", _retrieve_fused_backward, fake_backward),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moram::{_name}", _fake, lib=_LIBRARY)
