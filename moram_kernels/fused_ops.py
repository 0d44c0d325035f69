"""How the Triton backend meets autograd and torch.compile. No mathematics lives here.

Eager calls go straight to the kernels. Under torch.compile, torch.export and CUDA graphs the same
two functions are opaque ops (`torch.ops.moram.retrieve_fused` and `.._backward`): their shapes
depend on the capacity of the bank, never on how many of its atoms are live. On a device without
kernels the ops run the torch backend, so that a graph made for a GPU also runs on a CPU.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import torch_backend, torch_backward
from .aliases import Bank, Gradients, Settings
from .ops import TAGS, check_live
from .triton_backend import available
from .triton_backend.plan import Plan, fixed_form, plan, saved_shapes

if TYPE_CHECKING:
    from .triton_backend.forward import Saved

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


def retrieve_triton(
    x: Tensor, bank: Bank, residual: Tensor | None, settings: Settings, training: bool,
    num_frozen: Tensor | None, precision: str, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the Triton backend on rows x [M, D], with its closed-form backward.

    Args:
        bank: (keys, values, current_keys, current_values).
        num_frozen: live rows of keys and values, a 0-d int64 CPU tensor, or None for all.
        scores: float32 [M, N] if they are known already; eager calls only.
        The rest as in `moram_kernels.retrieve`.
    """
    leaves = (x, *bank[2:], residual)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in leaves
    )
    if torch.compiler.is_compiling():
        if num_frozen is None:
            num_frozen = torch.full((), bank[0].shape[0], dtype=torch.int64)
        if not differentiable:
            args = (x, *bank, residual, num_frozen, *settings, training, precision, False)
            return torch.ops.moram.retrieve_fused(*args)[0]
    elif num_frozen is not None:
        count = int(num_frozen)
        bank, num_frozen = (bank[0][:count], bank[1][:count], *bank[2:]), None
    if not differentiable:
        return _forward(x, bank, residual, settings, training, precision, None, scores)[0]
    return _RetrieveFused.apply(
        x, *bank, residual, num_frozen, settings, training, precision, scores, None, None
    )


def retrieve_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, bank: Bank, settings: Settings, training: bool,
    precision: str, scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x weight^T + bias + update, the base and the update in one output, for a frozen weight.

    Args: x, bank, settings and scores as for `retrieve_triton`; the rest as for
        `moram_kernels.retrieve_linear`.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *bank[2:])):
        return _RetrieveFused.apply(
            x, *bank, None, None, settings, training, precision, scores, weight, bias
        )
    base = torch.nn.functional.linear(x, weight, bias)
    return _forward(x, bank, base, settings, training, precision, None, scores, base)[0]


class _RetrieveFused(torch.autograd.Function):
    """Gradients go to x, the current segment and the residual; frozen atoms have none.

    With a weight the base Linear is part of the function, and its share of dx is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor,
        current_values: Tensor, residual: Tensor | None, num_frozen: Tensor | None,
        settings: Settings, training: bool, precision: str, scores: Tensor | None,
        weight: Tensor | None, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        bank = (keys, values, current_keys, current_values)
        ctx.backward_form = None
        if num_frozen is None:
            out = None
            if weight is not None:
                residual = out = torch.nn.functional.linear(x, weight, bias)
            output, saved, ctx.backward_form = _forward(
                x, bank, residual, settings, training, precision, True, scores, out
            )
            assert saved is not None
        else:
            output, *saved = torch.ops.moram.retrieve_fused(
                x, *bank, residual, num_frozen, *settings, training, precision, True
            )
        ctx.save_for_backward(x, *bank, *saved, num_frozen, weight)
        ctx.settings, ctx.training, ctx.precision = settings, training, precision
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "the Triton backend has no second derivative, which create_graph=True asks for; "
                'use backend="reference"'
            )
        x, keys, values, current_keys, current_values, *saved = ctx.saved_tensors
        *saved, num_frozen, weight = saved
        bank = (keys, values, current_keys, current_values)
        # An expanded gradient (of a sum) has stride 0; the kernels want rows.
        grad = grad.contiguous()
        needs = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5]))
        if num_frozen is None:
            dx, dkeys, dvalues = _backward(
                grad, x, bank, saved, ctx.settings, ctx.training, ctx.precision, needs,
                ctx.backward_form,
            )  # fmt: skip
        else:
            dx, dkeys, dvalues = torch.ops.moram.retrieve_fused_backward(
                grad, x, *bank, *saved, num_frozen, *ctx.settings, ctx.training, ctx.precision
            )
        if weight is not None and dx is not None:
            dx = torch.addmm(dx, grad, weight, out=dx)
        dresidual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        return dx, None, None, dkeys, dvalues, dresidual, *(None,) * 7


def plan_for(
    x: Tensor, bank: Bank, settings: Settings, training: bool, precision: str,
    keep: str | None = None, result: torch.dtype | None = None,
) -> Plan:  # fmt: skip
    """The plan of a call with these tensors.

    Args:
        x: rows [M, D]. bank: (keys, values, current_keys, current_values).
        settings: (top_k, temperature, threshold, eps).
        training: whether a backward follows. precision, keep: as for `plan`.
        result: the dtype of the output or of its gradient, if it is not that of x.
    """
    keys, values, current_keys, _ = bank
    dtype = x.dtype if {x.dtype, result or x.dtype} == {keys.dtype} else torch.float32
    return plan(
        x.shape[0],
        keys.shape[1],
        values.shape[1],
        keys.shape[0] + current_keys.shape[0],
        settings[0],
        str(dtype).removeprefix("torch."),
        training,
        available.device_of(x.device),
        current=current_keys.shape[0],
        joined=keys.shape[0] == 0 or current_keys.shape[0] == 0,
        precision=precision,
        keep=keep,
    )


def _forward(
    x: Tensor, bank: Bank, residual: Tensor | None, settings: Settings, training: bool,
    precision: str, save: bool | str | None, scores: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, "Saved | None", str | None]:  # fmt: skip
    """(output, saved tensors, form of the backward); save: None, True (either form) or a form."""
    from .triton_backend import forward as kernels
    from .triton_backend.segments import Table

    keys, values, current_keys, current_values = bank
    tokens, atoms = x.shape[0], keys.shape[0] + current_keys.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    if out is None:
        out = x.new_empty(tokens, values.shape[1], dtype=dtype)
    form = save if isinstance(save, str) else None
    chosen = plan_for(x, bank, settings, save is not None, precision, form, dtype)
    saved = None
    if save is not None:
        saved = kernels.new_saved(
            x, tokens, atoms, current_keys.shape[0], settings[0], chosen.backward
        )
        if scores is not None and chosen.backward == "dense":
            saved = saved._replace(scores=scores)
    if tokens and atoms and out.shape[1]:
        tables = Table.of(keys, current_keys), Table.of(values, current_values)
        kernels.forward(
            x, *tables, residual, out, settings, training, saved, chosen, precision, scores
        )
        return out, saved, chosen.backward
    # Nothing to compute; a bank without live atoms updates nothing.
    out.copy_(residual) if residual is not None else out.zero_()
    for tensor in saved or ():
        tensor.zero_()
    return out, saved, chosen.backward


def _backward(
    grad: Tensor, x: Tensor, bank: Bank, saved: Iterable[Tensor], settings: Settings,
    training: bool, precision: str, needs: Sequence[bool], form: str | None,
) -> Gradients:  # fmt: skip
    from .triton_backend import backward as kernels
    from .triton_backend.forward import Saved
    from .triton_backend.segments import Table

    keys, values, current_keys, current_values = bank
    if not x.shape[0] or not grad.shape[1] or not keys.shape[0] + current_keys.shape[0]:
        return (
            x.new_zeros(x.shape) if needs[0] else None,
            current_keys.new_zeros(current_keys.shape) if needs[1] else None,
            current_values.new_zeros(current_values.shape) if needs[1] else None,
        )
    tables = Table.of(keys, current_keys), Table.of(values, current_values)
    chosen = plan_for(x, bank, settings, True, precision, form, grad.dtype)
    dx, dkeys, dvalues = kernels.backward(
        grad, x, *tables, Saved(*saved), settings, training, chosen, precision, needs
    )
    if needs[1] and not current_keys.shape[0]:
        dkeys, dvalues = (t.new_zeros(t.shape) for t in (current_keys, current_values))
    return dx, dkeys, dvalues


def _retrieve_fused(
    x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor, current_values: Tensor,
    residual: Tensor | None, num_frozen: Tensor, top_k: int, temperature: float, threshold: float,
    eps: float, training: bool, precision: str, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    count, settings = int(num_frozen), (top_k, temperature, threshold, eps)
    check_live(count, keys)
    bank = (keys[:count], values[:count], current_keys, current_values)
    form = _fixed_form(keys, current_keys, top_k) if save else None
    wanted = _kept(x, keys, current_keys, top_k, form)
    with torch.autocast(x.device.type, enabled=False):
        if available.why_not(x.device):
            args = (x, *bank, residual, settings, training, False)
            output = torch_backend.forward(*args)[0]
            return output, *(x.new_zeros(s, dtype=d) for s, d in wanted)
        output, saved, _ = _forward(x, bank, residual, settings, training, precision, form)
    if saved is None:
        return output, *(x.new_empty(s, dtype=d) for s, d in wanted)
    # What the kernels left unwritten becomes zeros: an op must give the same every time.
    index, picked, scores, stats = saved
    if form == "dense":
        scores = scores[:, : count + current_keys.shape[0]]
    else:
        stats = stats[:1]
    filled = (index, picked, scores, stats)
    return output, *(_padded(t, shape) for t, (shape, _) in zip(filled, wanted, strict=True))


def _padded(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The matrix followed by rows and columns of zeros."""
    rows, columns = shape[0] - matrix.shape[0], shape[1] - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows)).contiguous()


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
    count, settings = int(num_frozen), (top_k, temperature, threshold, eps)
    bank = (keys[:count], values[:count], current_keys, current_values)
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
        dx, dkeys, dvalues = _backward(
            grad, x, bank, saved, settings, training, precision, needs, form
        )
    # Both gradients of the bank come in one buffer, which results of an op may not share.
    grads = (dx, dkeys, None if dvalues is None else dvalues.clone())
    likes = (x, current_keys, current_values)
    pairs = zip(grads, likes, strict=True)
    dx, dkeys, dvalues = (t.new_zeros(t.shape) if g is None else g for g, t in pairs)
    return dx, dkeys, dvalues


def _retrieve_fused_backward_fake(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    current_keys: Tensor,
    current_values: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, current_keys, current_values))


for _name, _impl, _fake in (
    ("retrieve_fused", _retrieve_fused, _retrieve_fused_fake),
    ("retrieve_fused_backward", _retrieve_fused_backward, _retrieve_fused_backward_fake),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moram::{_name}", _fake, lib=_LIBRARY)
