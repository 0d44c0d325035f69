"""The forward pass on each path of the plan: which kernels run, in which order, on what memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..aliases import Rule, Tile
from . import launcher
from .aggregate import launch_aggregate, launch_gather
from .decode import launch_decode
from .launcher import Steps
from .plan import Plan, saved_shapes
from .resident import launch_resident
from .scores import launch_scores
from .segments import Table
from .select import launch_select
from .select_groups import launch_select_groups, new_groups


class Saved(NamedTuple):
    """What the backward needs of the forward, for M tokens.

    From scores: scores float32 [M, N or more], stats float32 [4, M] (norm, largest score, 1 / sum
    of the shares, border value). From lists: index int32 [M, K], picked (their scores) float32
    [M, K], scores of the current atoms alone float32 [M, C], stats (only the norm).
    """

    index: Tensor
    picked: Tensor
    scores: Tensor
    stats: Tensor


def new_saved(
    like: Tensor, tokens: int, atoms: int, current: int, top_k: int, backward: str | None
) -> Saved:
    """`Saved` of empty tensors of the sizes that a backward needs.

    Args:
        like: a tensor on the device. The rest as for `saved_shapes`.
    """
    index, picked, scores, stats = saved_shapes(tokens, atoms, current, top_k, backward)
    return Saved(
        like.new_empty(*index, dtype=torch.int32),
        like.new_empty(*picked, dtype=torch.float32),
        like.new_empty(*scores, dtype=torch.float32),
        like.new_empty(*stats, dtype=torch.float32),
    )


def forward(
    x: Tensor,
    keys: Table,
    values: Table,
    residual: Tensor | None,
    out: Tensor,
    settings: Rule,
    training: bool,
    saved: Saved | None,
    plan: Plan,
    scores: Tensor | None = None,
    steps: Steps | None = None,
) -> None:
    """Fill out [M, O] and, for a backward, saved.

    Args:
        x: [M, D], M >= 1. keys, values: `Table`s. residual: [M, O] or None; may be out.
        settings: `Rule`.
        training: if true, the threshold is not applied.
        saved: `Saved` of the sizes of plan.backward, or None.
        plan: `Plan`.
        scores: x keys^T in float32 [M, N] if it is known already.
        steps: the launches of calls of this signature, or None.
    """
    residual = None if residual is None else launcher.rows(residual)
    rule = acting(settings, training)
    if plan.path == "resident" and scores is None:
        keep = None if saved is None else (saved.scores, saved.stats)
        tile = plan.tiles["resident"]
        launch_resident(x, keys, values, residual, out, rule, plan.precision, tile, keep, steps)
    elif plan.path == "decode" and scores is None:
        shape = (plan.tiles["splits"], x.shape[0], keys.num_rows)
        partial = x.new_empty(*shape, dtype=torch.float32)
        launch_scores(x, keys, partial, plan.precision, plan.tiles["scores"], shape[0], steps)
        launch_decode(partial, values, residual, out, rule, steps)
    else:
        # Scores that the backward needs are kept whole; others exist a chunk at a time.
        keeps = saved is not None and plan.backward == "dense"
        chunk = x.shape[0] if keeps else max(1, plan.chunk)
        own = scores is not None or plan.groups == "fused"
        matrix = None if own else multiplied(x, keys, plan.copy)
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            kept = None
            if saved is not None:
                index, picked, own = saved.index[part], saved.picked[part], saved.scores[part]
                kept = Saved(index, picked, own, saved.stats[:, part])
            _split(
                x[part],
                keys,
                values,
                None if residual is None else residual[part],
                out[part],
                rule,
                kept,
                plan,
                None if scores is None else scores[part],
                matrix,
                steps,
            )


def acting(settings: Rule, training: bool) -> Rule:
    """The rule as it acts: in training without a threshold."""
    top_k, temperature, threshold, eps = settings
    return Rule(top_k, temperature, 0.0 if training else threshold, eps)


def _split(
    x: Tensor,
    keys: Table,
    values: Table,
    residual: Tensor | None,
    out: Tensor,
    rule: Rule,
    saved: Saved | None,
    plan: Plan,
    scores: Tensor | None,
    matrix: Tensor | None,
    steps: Steps | None,
) -> None:
    tokens, atoms = x.shape[0], keys.num_rows
    # None, "apart" or "fused": whether selection goes by groups, and who finds their maxima.
    by_groups, groups, precision = plan.groups, None, plan.precision
    if scores is None:
        if saved is not None and plan.backward == "dense":
            scores = saved.scores[:, :atoms]
        else:
            scores = launcher.new_matrix(x, tokens, atoms, torch.float32)
        tile = plan.tiles["scores"]
        if by_groups == "fused":
            groups = new_groups(scores)
            launch_scores(x, keys, scores, precision, tile, groups=groups, steps=steps)
        else:
            score(x, keys, matrix, scores, precision, tile, steps)
    stats = None if saved is None else saved.stats
    if plan.path != "split-gather":
        dtype = launcher.meet(x, values, out)
        written = launcher.new_matrix(x, tokens, atoms, dtype)
        unscale = scores.new_empty(tokens) if dtype == torch.float16 else None
        dense = {"written": written, "unscale": unscale, "stats": stats}
        launch_select(scores, rule, **dense, steps=steps)
        tile = plan.tiles["aggregate"]
        matrix = None
        # The library knows no factors of rows, and would copy a residual of many rows first.
        onto = residual is not None and residual.stride(0) > 0
        if unscale is None and out.dtype == values.dtype and not onto:
            matrix = multiplied(written, values, plan.copy)
        aggregate(written, values, matrix, residual, out, precision, tile, unscale, steps)
        return
    count = min(rule.top_k, atoms)
    if saved is None:
        index = x.new_empty(tokens, count, dtype=torch.int32)
        picked, current = scores.new_empty(tokens, count), None
    else:
        index, picked = saved.index, saved.picked
        current = (saved.scores, keys.num_frozen) if atoms > keys.num_frozen else None
    lists = (index, scores.new_empty(tokens, count), picked)
    if by_groups:
        launch_select_groups(scores, rule, lists, current, stats, groups, steps)
    else:
        launch_select(scores, rule, lists=lists, current=current, stats=stats, steps=steps)
    launch_gather(lists[0], lists[1], values, residual, out, steps=steps)


def multiplied(left: Tensor, table: Table, copy: bool) -> Tensor | None:
    """A table as the one matrix [N, width] that the vendor's library multiplies, or None.

    Args:
        left: what it meets. copy: whether segments that lie apart are copied into one.
    """
    return table.matrix(copy) if launcher.can_multiply(left, table.frozen) else None


def score(
    a: Tensor,
    table: Table,
    matrix: Tensor | None,
    out: Tensor,
    precision: str,
    config: Tile,
    steps: Steps | None,
) -> None:
    """out = a rows^T in float32, by the vendor's library where it can.

    Args:
        a: [M, D]. table: `Table` of N rows of D numbers. matrix: as `multiplied` returns it.
        out: float32 [M, N].
        precision: of float32 products. config: the tile of the kernel. steps: of the call.
    """
    if matrix is not None:
        launcher.multiply(launcher.rows(a), matrix.t(), out)
    else:
        launch_scores(a, table, out, precision, config, steps=steps)


def aggregate(
    coefficients: Tensor,
    table: Table,
    matrix: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    precision: str,
    config: Tile,
    unscale: Tensor | None,
    steps: Steps | None,
) -> None:
    """out = residual + coefficients times a table's rows, by the vendor's library where it can.

    Args:
        coefficients: [M, N]. table: `Table` of N rows of O numbers.
        matrix: as `multiplied` returns it; None where the library cannot, as with a scale, a wider
            out or a residual of many rows.
        residual: [M, O] or None; may be out; of stride 0 if all its rows are one. out: [M, O].
        precision: of float32 products. config: the tile of the kernel.
        unscale: factors [M] of the rows of float16 coefficients, or None.
        steps: of the call.
    """
    if matrix is None:
        launch_aggregate(coefficients, table, residual, out, precision, config, unscale, steps)
    elif residual is None:
        launcher.multiply(coefficients, matrix, out)
    else:
        launcher.multiply_add(residual[0], coefficients, matrix, out)
