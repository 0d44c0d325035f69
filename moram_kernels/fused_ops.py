"""How the Triton backend meets autograd and torch.compile. No mathematics lives here.

Eager calls go straight to the kernels. Under torch.compile, torch.export and CUDA graphs the same
two functions are the opaque ops of `fused_library.py`.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .aliases import Bank, Gradients, Rule
from .calls import Course, Known, recall
from .triton_backend import available
from .triton_backend.plan import Plan, dtype_name, plan

if TYPE_CHECKING:
    from .triton_backend.forward import Saved


def retrieve_triton(
    x: Tensor, bank: Bank, residual: Tensor | None, settings: Rule, training: bool,
    num_frozen: Tensor | None, precision: str, scores: Tensor | None = None,
    known: Known | None = None,
) -> Tensor:  # fmt: skip
    """Run the Triton backend on rows x [M, D], with its closed-form backward.

    Args:
        bank: `Bank`.
        num_frozen: live rows of keys and values, a 0-d int64 CPU tensor, or None for all.
        scores: float32 [M, N] if they are known already; eager calls only.
        known: what is known of calls of this signature, or None.
        The rest as in `moram_kernels.retrieve`.
    """
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or bank.current_keys.requires_grad
        or bank.current_values.requires_grad
        or (residual is not None and residual.requires_grad)
    )
    if known is None and torch.compiler.is_compiling():
        if num_frozen is None:
            num_frozen = torch.full((), bank.keys.shape[0], dtype=torch.int64)
        if not differentiable:
            args = (x, *bank, residual, num_frozen, *settings, training, precision, False)
            return torch.ops.moram.retrieve_fused(*args)[0]
    elif num_frozen is not None:
        count = int(num_frozen)
        bank = bank._replace(keys=bank.keys[:count], values=bank.values[:count])
        num_frozen = None
    if not differentiable:
        how = (settings, training, precision, None, scores, known)
        return run_forward(x, bank, residual, *how)[0]
    return _RetrieveFused.apply(
        x, *bank, residual, num_frozen, settings, training, precision, scores, None, None, known
    )


def retrieve_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, bank: Bank, settings: Rule, training: bool,
    precision: str, scores: Tensor | None = None, known: Known | None = None,
) -> Tensor:  # fmt: skip
    """x weight^T + bias + update for a frozen weight, the product of which comes last.

    It reads what it is added to while it computes, where a sum of values would wait for it.

    Args: x, bank, settings, scores and known as for `retrieve_triton`; the rest as for
        `moram_kernels.retrieve_linear`.
    """
    trained = (x, bank.current_keys, bank.current_values)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained):
        return _RetrieveFused.apply(
            x, *bank, None, None, settings, training, precision, scores, weight, bias, known
        )
    shift = _rows_of(bias, x)
    output, *_ = run_forward(x, bank, shift, settings, training, precision, None, scores, known)
    return torch.addmm(output, x, weight.t(), out=output)


def _rows_of(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias [O] for every row of x, without memory of its own."""
    return None if bias is None else bias.expand(x.shape[0], -1)


class _RetrieveFused(torch.autograd.Function):
    """Gradients go to x, the current segment and the residual; frozen atoms have none.

    With a weight the base Linear is part of the function; it and its share of dx are added in
    place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, values: Tensor, current_keys: Tensor,
        current_values: Tensor, residual: Tensor | None, num_frozen: Tensor | None,
        settings: Rule, training: bool, precision: str, scores: Tensor | None,
        weight: Tensor | None, bias: Tensor | None, known: Known | None,
    ) -> Tensor:  # fmt: skip
        bank = Bank(keys, values, current_keys, current_values)
        ctx.backward_form = None
        if num_frozen is None:
            shift = residual if weight is None else _rows_of(bias, x)
            output, saved, ctx.backward_form = run_forward(
                x, bank, shift, settings, training, precision, True, scores, known
            )
            assert saved is not None
            if weight is not None:
                torch.addmm(output, x, weight.t(), out=output)
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
        bank = Bank(keys, values, current_keys, current_values)
        # An expanded gradient (of a sum) has stride 0; the kernels want rows.
        grad = grad.contiguous()
        wanted = ctx.needs_input_grad
        needs = (wanted[0], wanted[3] or wanted[4])
        if num_frozen is None:
            dx, dkeys, dvalues = run_backward(
                grad, x, bank, saved, ctx.settings, ctx.training, ctx.precision, needs,
                ctx.backward_form,
            )  # fmt: skip
        else:
            dx, dkeys, dvalues = torch.ops.moram.retrieve_fused_backward(
                grad, x, *bank, *saved, num_frozen, *ctx.settings, ctx.training, ctx.precision
            )
        if weight is not None and dx is not None:
            dx = torch.addmm(dx, grad, weight, out=dx)
        dresidual = grad.to(ctx.residual_dtype) if wanted[5] else None
        return dx, None, None, dkeys, dvalues, dresidual, *(None,) * 8


def plan_for(
    x: Tensor, bank: Bank, settings: Rule, training: bool, precision: str,
    keep: str | None = None, result: torch.dtype | None = None, residual: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a call with these tensors.

    Args:
        x: rows [M, D]. bank: `Bank`.
        settings: (top_k, temperature, threshold, eps).
        training: whether a backward follows. precision, keep: as for `plan`.
        result: the dtype of the output or of its gradient, if it is not that of x.
        residual: as for `plan`.
    """
    current = bank.current_keys.shape[0]
    return plan(
        x.shape[0],
        bank.keys.shape[1],
        bank.values.shape[1],
        bank.num_atoms,
        settings[0],
        dtype_name(x.dtype, bank.keys.dtype, result or x.dtype),
        training,
        available.device_of(x.device),
        current=current,
        joined=current in (0, bank.num_atoms),
        residual=residual,
        precision=precision,
        keep=keep,
    )


@functools.cache
def _kernels() -> tuple[Any, Any, Any, Any]:
    """(forward, backward, launcher, Table) of the kernels, which import Triton."""
    from .triton_backend import backward, forward, launcher
    from .triton_backend.segments import Table

    return forward, backward, launcher, Table


def run_forward(
    x: Tensor, bank: Bank, residual: Tensor | None, settings: Rule, training: bool,
    precision: str, save: bool | str | None, scores: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, "Saved | None", str | None]:  # fmt: skip
    """(output, saved tensors, form of the backward).

    Args:
        x: rows [M, D]. residual: [M, O] or None. save: None, True (either form) or a form.
        known: what is known of such calls, or None to look. The rest as for `retrieve_triton`.
    """
    kernels, _, launcher, Table = _kernels()
    keys, values, current_keys, current_values = bank
    tokens, atoms = x.shape[0], bank.num_atoms
    dtype = x.dtype if residual is None else residual.dtype
    if known is None:
        how = ("forward", settings, training, precision)
        known = recall((x, *bank, residual, scores), how)
    tables = Table.of(keys, current_keys), Table.of(values, current_values)
    # Another planner plans anew.
    name = (plan, save)
    course = None if known is None else known.courses.get(name)
    if course is None:
        form = save if isinstance(save, str) else None
        onto = residual is not None and residual.stride(0) > 0
        course = Course(plan_for(x, bank, settings, save is not None, precision, form, dtype, onto))
        if known is not None:
            known.courses[name] = course
    out = x.new_empty(tokens, values.shape[1], dtype=dtype)
    chosen, saved = course.plan, None
    if save is not None:
        saved = kernels.new_saved(
            x, tokens, atoms, current_keys.shape[0], settings[0], chosen.backward
        )
        if scores is not None and chosen.backward == "dense":
            saved = saved._replace(scores=scores)
    if tokens and atoms and out.shape[1]:
        with launcher.on(x.device):
            kind = None
            if chosen.path.startswith("split"):
                # The library multiplies what is joined.
                kind = tables[0].joined, tables[1].joined
            steps = None if known is None else launcher.Steps(course, kind)
            kernels.forward(
                x, *tables, residual, out, settings, training, saved, chosen, scores, steps
            )
        if steps is not None:
            steps.end()
        return out, saved, chosen.backward
    # Nothing to compute; a bank without live atoms updates nothing.
    out.copy_(residual) if residual is not None else out.zero_()
    for tensor in saved or ():
        tensor.zero_()
    return out, saved, chosen.backward


def run_backward(
    grad: Tensor, x: Tensor, bank: Bank, saved: Sequence[Tensor], settings: Rule,
    training: bool, precision: str, needs: tuple[bool, bool], form: str | None,
) -> Gradients:  # fmt: skip
    """(dx, dkeys, dvalues), each None where it is not needed.

    Args:
        grad: of the output [M, O]. saved, form: as `run_forward` returned them.
        needs: which of (x, the bank) want a gradient. The rest as for `run_forward`.
    """
    forward, kernels, launcher, Table = _kernels()
    keys, values, current_keys, current_values = bank
    if not x.shape[0] or not grad.shape[1] or not bank.num_atoms:
        return (
            x.new_zeros(x.shape) if needs[0] else None,
            current_keys.new_zeros(current_keys.shape) if needs[1] else None,
            current_values.new_zeros(current_values.shape) if needs[1] else None,
        )
    known = recall(
        (grad, x, *bank, *saved), ("backward", settings, training, precision, needs, form)
    )
    tables = Table.of(keys, current_keys), Table.of(values, current_values)
    course = None if known is None else known.courses.get(plan)
    if course is None:
        course = Course(plan_for(x, bank, settings, True, precision, form, grad.dtype))
        if known is not None:
            known.courses[plan] = course
    with launcher.on(x.device):
        kind = tables[0].joined, tables[1].joined
        steps = None if known is None else launcher.Steps(course, kind)
        how = (settings, training, course.plan, needs, steps)
        dx, dkeys, dvalues = kernels.backward(grad, x, *tables, forward.Saved(*saved), *how)
    if steps is not None:
        steps.end()
    if needs[1] and not current_keys.shape[0]:
        dkeys, dvalues = (t.new_zeros(t.shape) for t in (current_keys, current_values))
    return dx, dkeys, dvalues
