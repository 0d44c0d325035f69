"""Scoring one input against several banks at once, where the cost model says that it pays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fused_ops
from .activation import SelfActivation
from .aliases import Bank
from .api import pick_backend, rule_of
from .calls import Course, recall
from .triton_backend import available, cost
from .triton_backend.plan import Plan, dtype_name, rate_of

MAX_BANKS = 3


def shared_scores(
    x: Tensor,
    banks: Sequence[Sequence[Tensor]],
    activation: SelfActivation,
    *,
    training: bool,
    backend: str = "auto",
    precision: str = "ieee",
) -> list[Tensor] | None:
    """x keys^T for two or three banks that read the same x, or None where it does not pay.

    Args:
        x: inputs [..., D] on the banks' device.
        banks: tuples (keys, values, current_keys, current_values) of equal D and dtype.
        activation: `SelfActivation`; training, backend, precision: as for `retrieve`.
    Returns:
        One float32 tensor [M, N_i] a bank, for `retrieve(..., scores=)`; the same numbers as
        without. None where the torch backend runs, or where a bank's own path is faster.
    """
    x, banks = x.reshape(-1, x.shape[-1]), [Bank(*bank) for bank in banks]
    if not 2 <= len(banks) <= MAX_BANKS or not x.shape[0]:
        return None
    tensors = (x, *(tensor for bank in banks for tensor in bank))
    known = recall(tensors, ("shared", activation, training, backend, precision))
    # Another planner plans anew.
    course = None if known is None else known.courses.get(fused_ops.plan)
    if course is None:
        course = Course(_plan(x, banks, activation, training, backend, precision))
        if known is not None:
            known.courses[fused_ops.plan] = course
    if course.plan is None:
        return None
    from .triton_backend import launcher
    from .triton_backend.segments import Table
    from .triton_backend.shared_scores import launch_shared_scores

    tables = [Table.of(bank.keys.detach(), bank.current_keys.detach()) for bank in banks]
    with torch.no_grad(), launcher.on(x.device):
        steps = None if known is None else launcher.Steps(course)
        chosen = course.plan
        scores = launch_shared_scores(x, tables, chosen.precision, chosen.tiles["scores"], steps)
    if steps is not None:
        steps.end()
    return scores


def _plan(
    x: Tensor,
    banks: Sequence[Bank],
    activation: SelfActivation,
    training: bool,
    backend: str,
    precision: str,
) -> Plan | None:
    """The plan of the first bank, or None where sharing does not pay."""
    if any(bank.num_atoms == 0 for bank in banks):
        return None
    if any(
        pick_backend(backend, x, bank, activation.top_k, precision) != "triton" for bank in banks
    ):
        return None
    if len({bank.keys.dtype for bank in banks}) > 1:
        return None
    settings = rule_of(activation)
    plans = [fused_ops.plan_for(x, bank, settings, training, precision) for bank in banks]
    return plans[0] if pays(x, banks, plans) else None


def pays(x: Tensor, banks: Sequence[Bank], plans: Sequence[Plan]) -> bool:
    """Whether one product for all banks is modelled faster than one each.

    Args:
        x: rows [M, D]. banks: as for `shared_scores`. plans: `Plan`, one a bank.
    """
    if any(not plan.path.startswith("split") for plan in plans):
        return False
    rate = rate_of(dtype_name(x.dtype, banks[0].keys.dtype), plans[0].precision)
    device = available.device_of(x.device)
    sizes = [bank.num_atoms for bank in banks]
    single = [bank.num_atoms in (len(bank.keys), len(bank.current_keys)) for bank in banks]

    def product(columns: int, library: bool) -> float:
        return cost.product(
            device, x.shape[0], columns, x.shape[1], x.itemsize, rate, out=4, library=library
        )

    alone = sum(
        product(size, joined and rate == "half") + cost.LAUNCH
        for size, joined in zip(sizes, single, strict=True)
    )
    return product(sum(sizes), False) + cost.LAUNCH < alone
