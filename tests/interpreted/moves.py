"""Measured calls of every path, and the formulas of what each kernel must move. No tests here.

M tokens, D inputs, O outputs, N = F frozen + C current atoms, K = top_k, s bytes a number. A tile
is a program's share: tiles(M) = ceil(M / BLOCK_M). "K rows" are the rows of the selected atoms;
without those that the threshold silenced where it says "fired". Everything is once unless it says
how often. Lists are int32 and float32, scores and stats float32: 4 bytes. In float16, select and
rows_backward write a factor a token, which aggregate reads with the coefficients; dscores and
written of the current atoms take 4 bytes, and rows_backward writes dscores of both kinds.

kernel            reads                                          writes
_resident         x; keys and values tiles(M) times; residual    out; training: scores [M, N], stats
_score            a, tiles(N) times; table, tiles(M) times       out [splits, M, N]
_select, dense    scores                                         written [M, N] in s bytes; stats
_select, lists    scores                                         index, written, picked [M, K];
                                                                 training: current [M, C], stats
_score, fused     the same                                       out; maxima, squares of groups
_group            maxima, squares; scores of the atoms of K      index twice, written, picked; norm;
                  groups; index; apart: scores; training: those  apart: maxima, squares;
                  of the current atoms                           training: current [M, C]
_aggregate        coefficients, tiles(width) times;              out
                  table, tiles(M) times; residual
_gather           lists, tiles(width) times; K fired rows of     out
                  the table; residual; extra, and factor
                  tiles(width) times
_decode           scores [splits, M, N], tiles(O) times;         out
                  K fired rows of the values a token; residual
_rows_backward    scores, pull [M, N]; stats                     dscores [M, N], written [M, C]
_lists_backward   index, picked [M, K]; norm; grad; K rows of    dlist, factor, dscores and
                  the values a token; current [M, C]             written [M, C]
_gram             keys, 2 tiles(D) times                         square [D, D]
_bank_gradient    dscores tiles(D), written tiles(O) times;      dkeys, dvalues, once a split
                  x and grad tiles(C) times
_sum_splits       partial sums                                   dkeys, dvalues

So on every forward path x is read once per tile of atoms (once if resident), the residual once, the
output written once, and keys and values once per tile of tokens.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from support import DTYPE_NAMES, keep_separated, make_case, with_spare_rows
from traffic import assert_moves, measured

from moram_kernels import fused_ops, retrieve
from moram_kernels.triton_backend.plan import plan


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    out: int
    frozen: int
    current: int
    top_k: int
    dtype: torch.dtype
    aligned: bool = True

    @property
    def atoms(self):
        return self.frozen + self.current

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def scaled(self):
        """Whether rows of factors have a scale."""
        return self.dtype == torch.float16

    @property
    def summed(self):
        """Bytes of a factor in a sum over tokens."""
        return 4 if self.scaled else self.itemsize

    def __str__(self):
        sizes = (self.tokens, self.width, self.out, self.frozen, self.current, self.top_k)
        return "-".join(map(str, sizes)) + f"-{DTYPE_NAMES[self.dtype]}"


# Rows of whole sectors; a last tile that is not full along tokens, atoms and features.
EVEN = Shape(40, 128, 96, 32, 16, 8, torch.float32)
EVEN_HALF = replace(EVEN, tokens=72, dtype=torch.float16)
ONE_TILE = replace(EVEN, dtype=torch.bfloat16)
TWO_TILES = replace(EVEN_HALF, tokens=136, frozen=64, current=16)
ALL_OF_TWO_TILES = replace(TWO_TILES, top_k=90)
# Nothing is a multiple of anything.
ODD = Shape(37, 70, 45, 13, 6, 5, torch.float32, aligned=False)
ODD_HALF = replace(ODD, dtype=torch.float16)
ODD_BANK = replace(ODD, width=96, out=32, top_k=4)
FROZEN = replace(EVEN, tokens=24, frozen=48, current=0)
CURRENT = replace(EVEN, tokens=24, frozen=0, current=48)
FEW = Shape(5, 512, 96, 32, 16, 8, torch.float32)
FEW_ODD = Shape(3, 70, 300, 13, 6, 5, torch.float32, aligned=False)
WIDE = Shape(3, 16, 16, 8200, 8, 4, torch.float32)


@dataclass
class Measured:
    """The launches of a call; fired: which (token, atom) pairs weigh something.

    scores: of all atoms, in float64.
    """

    forward: list
    backward: list
    fired: torch.Tensor
    selected: torch.Tensor
    scores: torch.Tensor


def measure(monkeypatch, shape, path, training, residual=True, backward=False, threshold=0.2):
    """Run a bank with spare rows of NaN through one path, training for all gradients."""
    monkeypatch.setattr(fused_ops, "plan", functools.partial(plan, path=path))
    case = make_case(
        3, (8 * shape.tokens,), shape.frozen, shape.current, shape.width, shape.out,
        top_k=shape.top_k, threshold=threshold, training=training, residual=residual,
        dtype=shape.dtype,
    )  # fmt: skip
    case = keep_separated(case, shape.tokens, 1e-5)
    weights = weights_of(case)
    case = with_spare_rows(case, 3)
    leaves = (case.x, case.current_keys, case.current_values, case.residual)
    leaves = [t for t in leaves if t is not None and training]
    for leaf in leaves:
        leaf.requires_grad_()
    with measured() as forward:
        output = retrieve(
            case.x,
            case.keys,
            case.values,
            case.activation,
            current_keys=case.current_keys,
            current_values=case.current_values,
            residual=case.residual,
            training=training,
            backend="triton",
            num_frozen=case.num_frozen,
        )
    assert output.isfinite().all()
    if not backward:
        return Measured(forward, [], *weights)
    with measured() as launches:
        output.backward(case.grad)
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    return Measured(forward, launches, *weights)


def weights_of(case):
    """(fired, selected), bool [M, N], and the scores, in float64 and by sorting."""
    bank = [t.double() for t in (case.keys, case.current_keys) if t is not None]
    scores = case.x.double() @ torch.cat(bank).T
    norm_scores = scores / scores.norm(dim=-1, keepdim=True)
    top_k = min(case.activation.top_k, scores.shape[1])
    border = norm_scores.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    selected = norm_scores >= border
    fired = selected
    if not case.training:
        fired = selected & (norm_scores >= case.activation.threshold)
    return fired, selected, scores


def once(*sizes):
    """(distinct bytes, bytes moved) of a tensor that moves once."""
    return times(1, *sizes)


def times(count, *sizes):
    size = math.prod(sizes)
    return size, size * count


def rows_read(pairs, size):
    """Of rows of that many bytes, those of the (token, row) pairs."""
    return pairs.any(0).sum().item() * size, pairs.sum().item() * size


def segments(names, shape, count, width):
    """A table read whole, that often."""
    frozen, current = names
    return {
        frozen: times(count, shape.frozen, width, shape.itemsize),
        current: times(count, shape.current, width, shape.itemsize),
    }


def picked_segments(names, shape, pairs, width):
    """A table of which the rows of (token, atom) pairs are read."""
    size = width * shape.itemsize
    frozen, current = names
    return {
        frozen: rows_read(pairs[:, : shape.frozen], size),
        current: rows_read(pairs[:, shape.frozen :], size),
    }


def tiles(launch, size, block):
    return -(-size // launch.meta[block])


def named(launches, *kernels):
    assert [launch.kernel for launch in launches] == list(kernels)
    return launches


def check(launch, shape, reads, writes, single=()):
    assert_moves(launch, reads, writes, shape.aligned, single)


def check_scores(launch, shape, rows, width, table, count=1, groups=None):
    """The score kernel; rows: how many a has, table: atoms, or the columns of a square."""
    m, s = shape.tokens, shape.itemsize
    tokens, atoms = tiles(launch, m, "BLOCK_M"), tiles(launch, rows, "BLOCK_N")
    reads = {"a": times(atoms, m, width, s), **table(tokens)}
    writes = {"out": once(count, m, rows, 4), **(groups or {})}
    # Few tokens are scored against 32 atoms at a time: one group.
    check(launch, shape, reads, writes, [*(groups or {})])


def check_aggregate(launch, shape, width, residual):
    m, s = shape.tokens, shape.itemsize
    reads = {
        "coefficients": times(tiles(launch, width, "BLOCK_O"), m, shape.atoms, s),
        **segments(("frozen", "current"), shape, tiles(launch, m, "BLOCK_M"), width),
    }
    if residual:
        reads["residual"] = once(m, width, s)
    if shape.scaled:
        reads["unscale"] = times(tiles(launch, width, "BLOCK_O"), m, 4)
    check(launch, shape, reads, {"out": once(m, width, s)})


def table_of(shape, width):
    return lambda count: segments(("frozen", "current"), shape, count, width)


def check_gather(launch, shape, width, fired, more):
    m, k = shape.tokens, shape.top_k
    count = tiles(launch, width, "BLOCK_O")
    reads = {
        "index": times(count, m, k, 4),
        "coefficients": times(count, m, k, 4),
        **picked_segments(("frozen", "current"), shape, fired, width),
        **more,
    }
    check(launch, shape, reads, {"out": once(m, width, shape.itemsize)}, ["factor"])
