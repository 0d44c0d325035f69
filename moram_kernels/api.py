"""The public operator: picks a backend and flattens the leading dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - not in its stub

from . import fused_library  # noqa: F401 - defines ops
from .activation import SelfActivation
from .aliases import Bank, Rule
from .calls import Known, recall
from .checks import bank_of, check_scores, checked
from .fused_ops import retrieve_linear_triton, retrieve_triton
from .ops import retrieve_torch
from .reference import retrieve_reference
from .torch_backend import forward_one
from .triton_backend import available
from .triton_backend.plan import PRECISIONS, dtype_name, why_not_covered

BACKENDS = ("auto", "reference", "torch", "triton")


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run on this machine, without "auto"."""
    return tuple(name for name in BACKENDS if name != "auto" and why_unavailable(name) is None)


def why_unavailable(backend: str) -> str | None:
    """Why an explicitly named backend cannot run here, one sentence, or None if it can."""
    return available.why_not() if backend == "triton" else None


def retrieve(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    activation: SelfActivation,
    *,
    current_keys: Tensor | None = None,
    current_values: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
    precision: str = "ieee",
    num_frozen: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Read a memory update for each token from a bank of rank-1 atoms.

    update = sum_i w_i s_i values_i with s = x keys^T over the frozen and the current atoms together
    and w the softmax of the top_k normalised scores; see `SelfActivation`. Gradients flow to x, the
    residual and the current segment only.

    Args:
        x: inputs [..., D], any floating dtype; may be non-contiguous or empty.
        keys: keys of the frozen atoms [F, D]; F may be 0 if there are current atoms.
        values: values of the frozen atoms [F, O], dtype of keys.
        activation: `SelfActivation`.
        current_keys, current_values: the trainable atoms [C, D] and [C, O], both or neither.
        residual: added to the update, [..., O]; saves one pass over the output.
        training: if true, the threshold is not applied.
        backend: "auto", "reference", "torch" or "triton". Only "auto" chooses: triton for tensors
            on a GPU, where its kernels cover the call, else torch; never Triton's interpreter.
            Under the transforms of torch.func (vmap, grad, jvp) it is the reference, which alone
            they can follow. On the meta device nothing is computed: every name gives shape and
            dtype.
        precision: of the Triton backend's float32 products: "ieee", or "bf16x6", which is as exact
            to a few float32 roundings and uses tensor cores. Where dtypes are mixed and
            inputs have 16 bits it is the latter; where bfloat16 meets float32, with three products
            in place of six. Products of one 16-bit dtype ignore it.
        num_frozen: live rows of keys and values if they have spare capacity, an int64 CPU tensor
            without dimensions; the rows after them are never read. torch.compile does not
            specialise on its value.
        scores: x keys^T over all atoms, float32 [M, N], if `sharing.shared_scores` made them. Only
            the Triton backend reads them; they must belong to this very x and bank.
    Returns:
        residual + update [..., O] in the dtype of residual, or of x where there is none. Scores,
        norm, softmax and sums are float32 (float64 for float64 inputs), autocast or not, and the
        update is rounded once, to that dtype. Where x, bank and output all have one 16-bit dtype,
        w_i s_i may be rounded to it before it meets values_i, and nowhere else.
        What is not finite in a row of x stays in that row of the output. A value that is not
        finite reaches the tokens that select its atom; where all values are multiplied (the
        reference, small banks) it makes its feature NaN for every other token too, as 0 x inf is;
        where selected ones are gathered (large banks, few tokens) it does not.
    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shape, dtype, device or name mismatch; the message names argument and value.
        RuntimeError: the backend asked for by name cannot run these tensors here, or
            create_graph=True asks the torch or Triton backend for a second derivative. They have
            none; for a few thousand scores the torch backend leaves the work to autograd, which
            does. The reference always has one.
    Source: Lu et al., ICML 2026, arXiv 2506.21035 (self-activation, sparse selection).
    Cost: 2 M N D FLOPs for the scores plus 2 M top_k O for the values of large banks.
    """
    current = (current_keys, current_values)
    known = None
    if num_frozen is None and may_be_triton(backend, x):
        tensors = (x, keys, values, *current, residual, scores)
        known = recall(tensors, ("retrieve", activation, training, backend, precision))
    if known is not None and known.checked:
        bank = bank_of(keys, values, *current)
        backend = "triton"
    else:
        bank = checked(x, keys, values, activation, *current, residual, num_frozen)
        if scores is not None:
            check_scores(scores, x, bank, num_frozen)
        backend = pick_backend(backend, x, bank, activation.top_k, precision)
        if known is not None:
            known.checked = backend == "triton"
    lead = x.shape[:-1]
    if len(lead) != 1:
        rows = math.prod(lead)
        x = x.reshape(rows, x.shape[-1])
        residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
    args = (backend, x, bank, activation, residual, training, num_frozen, precision, scores, known)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            output = _run(*args, True)
    else:
        output = _run(*args, False)
    return output if len(lead) == 1 else output.view(*lead, output.shape[-1])


def retrieve_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    activation: SelfActivation,
    *,
    current_keys: Tensor | None = None,
    current_values: Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
    precision: str = "ieee",
    scores: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias + update: `retrieve` onto a frozen Linear that it computes itself.

    As `retrieve(.., residual=linear(x, weight, bias))`, with as many roundings to the dtype of x.
    The Triton backend computes the update first: it is rounded, and the base's product added in
    place, where `retrieve` has the base rounded first. In the backward the base's share of dx
    is added to its own in place. Both save a pass. For other bases (quantised ones) use `retrieve`.

    Args:
        weight, bias: [O, D] and [O] or None, in the dtype of x; they get no gradient from here.
        The rest as for `retrieve`.
    Returns:
        [..., O] in the dtype of x.
    Raises:
        As `retrieve`.
    """
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor):
        kinds = f"{type(x).__name__} and {type(weight).__name__}"
        raise TypeError(f"x and weight must be tensors, got {kinds}")
    current = (current_keys, current_values)
    # What the signature of a call does not say.
    alone = (
        not may_be_triton(backend, x)
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or weight.requires_grad
    )
    known = None
    if not alone and not (bias is not None and bias.requires_grad):
        tensors = (x, weight, bias, keys, values, *current, scores)
        known = recall(tensors, ("linear", activation, training, backend, precision))
    if known is not None and known.checked:
        bank = bank_of(keys, values, *current)
    elif alone or _stands_alone(x, weight, bias, values):
        bank = None
    else:
        bank = checked(x, keys, values, activation, *current, None, None)
        if scores is not None:
            check_scores(scores, x, bank, None)
        if pick_backend(backend, x, bank, activation.top_k, precision) != "triton":
            bank = None
        elif known is not None:
            known.checked = True
    if bank is None:
        return retrieve(
            x,
            keys,
            values,
            activation,
            current_keys=current_keys,
            current_values=current_values,
            residual=torch.nn.functional.linear(x, weight, bias),
            training=training,
            backend=backend,
            precision=precision,
            scores=scores,
        )
    rows = x.reshape(-1, x.shape[-1])
    settings = rule_of(activation)
    how = (settings, training, precision, scores, known)
    output = retrieve_linear_triton(rows, weight, bias, bank, *how)
    return output.view(*x.shape[:-1], output.shape[-1])


def retrieve_one(
    x: Tensor,
    bank: Sequence[Tensor],
    activation: SelfActivation,
    residual: Tensor,
    training: bool,
    backend: str,
) -> Tensor | None:
    """As `retrieve` for one token at inference on the CPU, without its checks.

    Args:
        x: [.., D], of one token. bank: (keys, values, current_keys, current_values), which fit.
        residual: [.., O]. activation, training, backend: as for `retrieve`.
    Returns:
        [.., O], or None where `retrieve` must be called.
    """
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or backend not in ("auto", "torch")
        or not x.dtype == residual.dtype == bank[0].dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or _functorch.peek_interpreter_stack()
    ):
        return None
    rows, onto = x.reshape(1, -1), residual.reshape(1, -1)
    output = forward_one(rows, bank, onto, rule_of(activation), training)
    return None if output is None else output.view(residual.shape)


def may_be_triton(backend: str, x: Tensor) -> bool:
    """Whether the Triton backend may run for a name: "auto" takes it on a GPU alone.

    Args:
        backend: as for `retrieve`. x: the inputs.
    """
    return backend == "triton" or (backend == "auto" and getattr(x, "is_cuda", False))


def _stands_alone(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor) -> bool:
    """Whether the base Linear is a call of its own; what does not fit is for that to refuse."""
    base = [weight] if bias is None else [weight, bias]
    if torch.compiler.is_compiling() or not isinstance(values, Tensor):
        return True
    if any(t.requires_grad or t.dtype != x.dtype for t in base):
        return True
    fits = weight.shape == (*values.shape[1:], *x.shape[-1:])
    return not fits or (bias is not None and bias.shape != weight.shape[:1])


def rule_of(activation: SelfActivation) -> Rule:
    """The settings of an activation as kernels take them."""
    return Rule(activation.top_k, activation.temperature, activation.threshold, activation.eps)


def pick_backend(backend: str, x: Tensor, bank: Bank, top_k: int, precision: str = "ieee") -> str:
    """The backend that runs for a name: itself, or for "auto" the one that suits the tensors.

    Args:
        x, bank: inputs and (keys, values, current_keys, current_values).
    Raises:
        ValueError: there is no such backend or precision.
        RuntimeError: a backend asked for by name cannot run these tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if x.is_meta:
        return "reference"
    if not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack():
        if backend in ("torch", "triton"):
            raise RuntimeError(
                f"backend={backend!r} cannot run under the transforms of torch.func (vmap, grad, "
                'jvp); use backend="reference", or "auto", which takes it there'
            )
        return "reference"
    if backend == "auto":
        fits = x.is_cuda and available.installed() and not available.interpreting()
        return "triton" if fits and _why_not_triton(x, bank, top_k, precision) is None else "torch"
    if backend == "triton":
        reason = _why_not_triton(x, bank, top_k, precision)
        if reason:
            raise RuntimeError(f'backend="triton" cannot run: {reason}')
    return backend


def _why_not_triton(x: Tensor, bank: Bank, top_k: int, precision: str) -> str | None:
    """Why the kernels cannot run these tensors, one sentence, or None."""
    reason = available.why_not(x.device) or available.why_not_dtypes({x.dtype, bank.keys.dtype})
    if reason:
        return reason
    dtype = dtype_name(x.dtype, bank.keys.dtype)
    return why_not_covered(bank.num_atoms, top_k, dtype, precision)


def _run(
    backend: str,
    x: Tensor,
    bank: Bank,
    activation: SelfActivation,
    residual: Tensor | None,
    training: bool,
    num_frozen: Tensor | None,
    precision: str,
    scores: Tensor | None,
    known: Known | None,
    autocast: bool,
) -> Tensor:
    settings = rule_of(activation)
    if backend == "torch":
        return retrieve_torch(x, *bank, residual, settings, training, num_frozen, autocast)
    if backend == "triton":
        how = (settings, training, num_frozen, precision)
        return retrieve_triton(x, bank, residual, *how, scores, known)
    keys, values, current_keys, current_values = bank
    if num_frozen is not None:
        keys, values = keys[: int(num_frozen)], values[: int(num_frozen)]
    all_keys = torch.cat([keys, current_keys])
    all_values = torch.cat([values, current_values])
    return retrieve_reference(x, all_keys, all_values, activation, residual, training)
