"""How the torch backend meets autograd and torch.compile. No mathematics lives here.

Eager calls go straight to `torch_backend`. Under torch.compile the same two functions are opaque
ops (`torch.ops.moram.*`), because they choose by data (ties, live atoms): the graph then holds one
node whose shapes depend on the capacity of the bank, never on how many of its atoms are live.
"""

from typing import Any

import torch
from torch import Tensor

from . import torch_backend, torch_backward
from .aliases import Gradients, Rule

# The ops read the live count on the host: a captured graph would keep the count of its capture.
TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("pt2_compliant_tag", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
)
_LIBRARY = torch.library.Library("moram", "DEF")
_BANK = "Tensor keys, Tensor values, Tensor current_keys, Tensor current_values"
_SETTINGS = "int top_k, float temperature, float threshold, float eps, bool training"
_SAVED = "Tensor index, Tensor scores, Tensor weights, Tensor norm, Tensor all_scores"
_LIBRARY.define("live_count(Tensor live, Tensor noted, int unit) -> Tensor", tags=TAGS)
_LIBRARY.define(
    f"retrieve(Tensor x, {_BANK}, Tensor? residual, Tensor num_frozen, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_LIBRARY.define(
    f"retrieve_backward(Tensor grad, Tensor x, {_BANK}, {_SAVED}, Tensor num_frozen, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def retrieve_torch(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
    settings: Rule,
    training: bool,
    num_frozen: Tensor | None,
    autocast: bool,
) -> Tensor:
    """Run the torch backend on rows x [M, D], with its closed-form backward.

    Args:
        num_frozen: live rows of keys and values, a 0-d int64 CPU tensor, or None for all.
        autocast: whether the caller runs under autocast, and so perhaps the backward too.
        The rest as in `torch_backend.forward`.
    """
    if torch.compiler.is_compiling():
        if num_frozen is None:
            num_frozen = torch.full((), keys.shape[0], dtype=torch.int64)
        return _Retrieve.apply(
            x, keys, values, current_keys, current_values, residual, num_frozen, settings, training
        )
    if num_frozen is not None:
        count = int(num_frozen)
        keys, values = keys[:count], values[:count]
    num_atoms = keys.shape[0] + current_keys.shape[0]
    few = (
        not autocast
        and current_keys.shape[0]
        and x.shape[0] * num_atoms <= torch_backend.FEW_SCORES
    )
    differentiable = (x, current_keys, current_values, residual)
    # For few scores calls are dearer than arithmetic, and autograd's calls are the cheaper ones.
    if (
        few
        or not torch.is_grad_enabled()
        or not any(t is not None and t.requires_grad for t in differentiable)
    ):
        output, _ = torch_backend.forward(
            x,
            keys,
            values,
            current_keys,
            current_values,
            residual,
            settings,
            training,
            save=False,
            dense=True if few else None,
        )
        return output
    return _Retrieve.apply(
        x, keys, values, current_keys, current_values, residual, None, settings, training
    )


class _Retrieve(torch.autograd.Function):
    """Gradients go to x, the current segment and the residual; frozen atoms have none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        current_keys: Tensor,
        current_values: Tensor,
        residual: Tensor | None,
        num_frozen: Tensor | None,
        settings: Rule,
        training: bool,
    ) -> Tensor:
        bank = (keys, values, current_keys, current_values)
        if num_frozen is None:
            output, saved = torch_backend.forward(x, *bank, residual, settings, training, True)
            assert saved is not None
        else:
            output, *saved = torch.ops.moram.retrieve(
                x, *bank, residual, num_frozen, *settings, training
            )
        ctx.save_for_backward(x, *bank, *saved, num_frozen)
        ctx.settings, ctx.training = settings, training
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "the torch backend has no second derivative, which create_graph=True asks for; "
                'use backend="reference"'
            )
        if not compiling and torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _Retrieve._backward(ctx, grad)
        return _Retrieve._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, values, current_keys, current_values, *saved, num_frozen = ctx.saved_tensors
        bank = (keys, values, current_keys, current_values)
        # An expanded gradient (of a sum) has stride 0; the kernels want rows.
        grad = grad.contiguous()
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        if num_frozen is None:
            saved = torch_backend.Saved(*saved)
            dx, dkeys, dvalues = torch_backward.backward(
                grad, x, *bank, saved, ctx.settings, ctx.training, needs
            )
        else:
            dx, dkeys, dvalues = torch.ops.moram.retrieve_backward(
                grad, x, *bank, *saved, num_frozen, *ctx.settings, ctx.training
            )
        dresidual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        return dx, None, None, dkeys, dvalues, dresidual, None, None, None


def _is_dense(num_atoms: int, top_k: int) -> bool:
    # Independent of the number of tokens, so that shapes do not depend on it.
    return torch_backend.is_dense(num_atoms, top_k, float("inf"))


def _sizes(num_atoms: int, top_k: int, width: int) -> tuple[int, int, int]:
    """Columns of (index, scores, all_scores) that hold a bank of up to so many live atoms."""
    if _is_dense(num_atoms, top_k):
        return 0, num_atoms, 0
    kept = torch_backend.kept_scores(num_atoms, width)
    return top_k, torch_backend.GATHER_RATIO * top_k, kept


def _retrieve(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
    num_frozen: Tensor,
    top_k: int,
    temperature: float,
    threshold: float,
    eps: float,
    training: bool,
) -> tuple[Tensor, ...]:
    count = int(num_frozen)
    check_live(count, keys)
    output, saved = torch_backend.forward(
        x,
        keys[:count],
        values[:count],
        current_keys,
        current_values,
        residual,
        Rule(top_k, temperature, threshold, eps),
        training,
        True,
        _is_dense(count + len(current_keys), top_k),
    )
    assert saved is not None
    index, scores, found = _sizes(len(keys) + len(current_keys), top_k, keys.shape[1])
    return (
        output,
        padded(saved.index, len(x), index),
        padded(saved.scores, len(x), scores),
        padded(saved.weights, len(x), scores),
        saved.norm,
        padded(saved.all_scores, len(x), found),
    )


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix, none that an op was called with, of so many rows and columns, the new ones zero."""
    more = columns - matrix.shape[1], rows - matrix.shape[0]
    if any(more):
        matrix = torch.nn.functional.pad(matrix, (0, more[0], 0, more[1]))
    return matrix.contiguous()


def _retrieve_fake(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    residual: Tensor | None,
    num_frozen: Tensor,
    top_k: int,
    temperature: float,
    threshold: float,
    eps: float,
    training: bool,
) -> tuple[Tensor, ...]:
    dtype = torch_backend.compute_dtype(x, current_keys)
    num_atoms = keys.shape[0] + current_keys.shape[0]
    index, scores, found = _sizes(num_atoms, top_k, keys.shape[1])
    rows = x.shape[0]
    return (
        x.new_empty(rows, values.shape[1], dtype=x.dtype if residual is None else residual.dtype),
        x.new_empty(rows, index, dtype=torch.int32),
        x.new_empty(rows, scores, dtype=dtype),
        x.new_empty(rows, scores, dtype=dtype),
        x.new_empty(rows, 1, dtype=dtype),
        x.new_empty(rows, found, dtype=dtype),
    )


def _retrieve_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    index: Tensor,
    scores: Tensor,
    weights: Tensor,
    norm: Tensor,
    all_scores: Tensor,
    num_frozen: Tensor,
    top_k: int,
    temperature: float,
    threshold: float,
    eps: float,
    training: bool,
) -> Gradients:
    count = int(num_frozen)
    num_atoms = columns = count + len(current_keys)
    kept = 0
    if _is_dense(num_atoms, top_k):
        index = index[:, :0]
    else:
        columns = top_k
        if not torch_backend.uses_gram(x.shape[0], count, x.shape[1]):
            kept = torch_backend.kept_scores(num_atoms, x.shape[1])
    saved = torch_backend.Saved(
        index, scores[:, :columns], weights[:, :columns], norm, all_scores[:, :kept]
    )
    return torch_backward.backward(
        grad,
        x,
        keys[:count],
        values[:count],
        current_keys,
        current_values,
        saved,
        Rule(top_k, temperature, threshold, eps),
        training,
        (True, True, True),
    )


def fake_backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Shapes of the gradients, for tracing.

    Args: as for the ops that end in "_backward"; what follows does not matter.
    """
    return tuple(t.new_empty(t.shape) for t in (x, current_keys, current_values))


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None in inference mode, which does not count it."""
    return None if tensor.is_inference() else tensor._version


def _live_count(live: Tensor, noted: Tensor, unit: int) -> Tensor:
    """A count on any device, which is in steps of `unit`, as a tensor on the CPU.

    Waits for the device only where `noted` (address, version, value) is not of this tensor as it
    is now; then it notes that. A tensor that nobody wrote to may have the address of another.
    """
    address, version, count = noted.tolist()
    now = version_of(live)
    if not now or (address, version) != (live.data_ptr(), now):
        count = round(int(live) / unit)
        noted.copy_(torch.tensor((live.data_ptr(), now or -1, count)))
    return torch.tensor(count)


def _live_count_fake(live: Tensor, noted: Tensor, unit: int) -> Tensor:
    return noted.new_empty(())


def check_live(count: int, keys: Tensor) -> None:
    """Raise unless a bank has that many frozen rows."""
    if not 0 <= count <= keys.shape[0]:
        raise RuntimeError(
            f"num_frozen must be in [0, {keys.shape[0]}], the rows of keys, got {count}"
        )


for _name, _impl, _fake in (
    ("live_count", _live_count, _live_count_fake),
    ("retrieve", _retrieve, _retrieve_fake),
    ("retrieve_backward", _retrieve_backward, fake_backward),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moram::{_name}", _fake, lib=_LIBRARY)
