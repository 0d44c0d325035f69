"""The backward pass from what the forward saved: which kernels run, on what memory.

Gradients go to x and to the current atoms; frozen atoms have none. At most five launches. No
atomics: two runs give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..aliases import Gradients, Rule
from . import launcher
from .aggregate import launch_gather
from .forward import Saved, acting, aggregate, multiplied, score
from .launcher import Steps
from .lists_backward import launch_lists_backward
from .outer import launch_bank_gradient, launch_gram
from .plan import Plan
from .rows_backward import launch_rows_backward
from .segments import Table


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Table,
    values: Table,
    saved: Saved,
    settings: Rule,
    training: bool,
    plan: Plan,
    needs: Sequence[bool],
    steps: Steps | None = None,
) -> Gradients:
    """(dx [M, D] in the dtype of x or None, dkeys [C, D] or None, dvalues [C, O] or None).

    Args:
        grad: dy [M, O]. x: [M, D], M >= 1. keys, values: `Table`s with C current rows.
        saved: `Saved`. settings, training: those of the forward.
        plan: `Plan` with a backward.
        needs: which of (x, the bank) want a gradient.
        steps: the launches of calls of this signature, or None.
    """
    grad, x = launcher.rows(grad), launcher.rows(x)
    run = _from_scores if plan.backward == "dense" else _from_lists
    needs = (needs[0], needs[1] and keys.num_rows > keys.num_frozen)
    how = (acting(settings, training), plan, needs, steps)
    return run(grad, x, keys, values, saved, *how)


def _from_scores(
    grad: Tensor,
    x: Tensor,
    keys: Table,
    values: Table,
    saved: Saved,
    rule: Rule,
    plan: Plan,
    needs: Sequence[bool],
    steps: Steps | None,
) -> Gradients:
    tokens, atoms, frozen = x.shape[0], keys.num_rows, keys.num_frozen
    tiles, precision = plan.tiles, plan.precision
    pull = launcher.new_matrix(x, tokens, atoms, torch.float32)
    matrix = multiplied(grad, values, plan.copy)
    score(grad, values, matrix, pull, precision, tiles["scores"], steps)
    dscores = launcher.new_matrix(x, tokens, atoms, launcher.meet(x, keys))
    written = x.new_empty(tokens, atoms - frozen, dtype=launcher.summed(grad, values))
    own, unscale = dscores[:, frozen:], None
    if dscores.dtype == torch.float16:
        own, unscale = (pull.new_empty(shape) for shape in ((tokens, atoms - frozen), (tokens,)))
    scores, stats = saved.scores, saved.stats
    launch_rows_backward(
        scores,
        pull,
        stats,
        dscores,
        written,
        frozen,
        rule,
        own,
        unscale,
        steps=steps,
    )
    dx = dkeys = dvalues = None
    if needs[0]:
        dx = torch.empty_like(x)
        matrix = None
        if unscale is None and dx.dtype == keys.dtype:
            matrix = multiplied(dscores, keys, plan.copy)
        tile = tiles["aggregate"]
        aggregate(dscores, keys, matrix, None, dx, precision, tile, unscale, steps)
    if needs[1]:
        dkeys, dvalues = launch_bank_gradient(
            own,
            x,
            written,
            grad,
            keys.dtype,
            precision,
            tiles["bank"],
            tiles["bank_splits"],
            steps,
        )
    return dx, dkeys, dvalues


def _from_lists(
    grad: Tensor,
    x: Tensor,
    keys: Table,
    values: Table,
    saved: Saved,
    rule: Rule,
    plan: Plan,
    needs: Sequence[bool],
    steps: Steps | None,
) -> Gradients:
    tokens, tiles, precision = x.shape[0], plan.tiles, plan.precision
    current = keys.num_rows - keys.num_frozen
    dlist, factor = torch.empty_like(saved.picked), saved.picked.new_empty(tokens)
    dscores = x.new_empty(tokens, current, dtype=launcher.summed(x, keys))
    written = x.new_empty(tokens, current, dtype=launcher.summed(grad, values))
    launch_lists_backward(
        grad,
        (saved.index, saved.picked),
        saved.stats,
        saved.scores,
        values,
        dlist,
        factor,
        dscores,
        written,
        rule,
        steps,
    )
    dx = dkeys = dvalues = None
    if needs[0]:
        # sum over all atoms of score x key = x (keys^T keys).
        # Squares of long keys overflow float16; bf16x6 keeps their product on the tensor cores.
        wide = x.dtype == keys.dtype == torch.float16
        dtype = torch.float32 if wide else launcher.meet(x, keys)
        square = x.new_empty(x.shape[1], x.shape[1], dtype=dtype)
        matrix = multiplied(keys.frozen, keys, plan.copy)
        if matrix is not None:
            launcher.multiply(matrix.t(), matrix, square)
        else:
            launch_gram(keys, square, precision, tiles["gram"], steps)
        through = x.new_empty(x.shape, dtype=torch.float32)
        exact, tile = ("bf16x6", "through") if wide else (precision, "scores")
        squares = Table.of(square, square[:0])
        matrix = multiplied(x, squares, False)
        score(x, squares, matrix, through, exact, tiles[tile], steps)
        dx = torch.empty_like(x)
        launch_gather(saved.index, dlist, keys, None, dx, through, factor, steps)
    if needs[1]:
        # One pass without splits: the launches stay five, and the bank is small beside the rest.
        dkeys, dvalues = launch_bank_gradient(
            dscores, x, written, grad, keys.dtype, precision, tiles["bank"], 1, steps
        )
    return dx, dkeys, dvalues
