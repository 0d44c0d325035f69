"""The parity recipe: which selections are right, and what must follow from one.

Float scores differ in their last bits, so two right implementations may select different atoms.
A kernel's own selection is therefore checked against float64 scores and their error bound, and then
everything else against the published equations for that selection. Plain torch and autograd on
`support.Case`; nothing of the package under test is imported.
"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from support import LEAVES, assert_within_budget

# Below this distance in the normalised score, whether an atom passes the threshold is left open.
NEAR = 1e-6
# How many float32 runs, each in its own order of summation, say what a plain run's error is. In one
# row, or where a number is 0 by cancellation, a few roundings decide, and so few runs say too
# little: an error beyond their budget is held against more of them.
PLAIN_RUNS = (6, 24, 96)


class Tally(NamedTuple):
    """Rows whose selection is not float64's, and rows whose border is closer than the bound.

    (0, 0): the selection is float64's, and no rounding on any CPU could have made it another.
    """

    swapped: int
    unclear: int


def live(case):
    """(keys, values) of all live atoms."""
    case = case.without_spare_rows()
    if case.current_keys is None:
        return case.keys, case.values
    return torch.cat([case.keys, case.current_keys]), torch.cat([case.values, case.current_values])


def exact_scores(case, roundings=1):
    """(scores, bound of the error of a float32 sum) in float64 [M, N]."""
    x, keys = case.x.double(), live(case)[0].double()
    return x @ keys.T, roundings * 2.0**-22 * (x.abs() @ keys.abs().T)


def stable_top(scores, top_k):
    """The top_k largest of each row; of equal ones the lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def check_selection(case, kept, *, exact=False, roundings=1):
    """Assert that a selection [M, N] bool is one that float32 scores allow.

    exact: the scores have no rounding error (small integers), so that ties go by index.
    """
    scores, bound = exact_scores(case, roundings)
    count = min(case.activation.top_k, scores.shape[1])
    right = stable_top(scores, count)
    assert (kept.sum(-1) == count).all(), f"kept {kept.sum(-1).tolist()} atoms, not {count}"
    lowest = (scores + bound).masked_fill(~kept, float("inf")).amin(-1)
    highest = (scores - bound).masked_fill(kept, float("-inf")).amax(-1)
    assert (lowest >= highest).all(), f"a dropped atom is {(highest - lowest).max():.3e} too large"
    no_error = torch.full((len(kept),), exact) | (bound.sum(-1) == 0)
    swapped = (kept != right).any(-1)
    assert not (swapped & no_error).any(), "of equal scores the lowest index must win"
    border = (scores + bound).masked_fill(right, float("-inf")).amax(-1)
    unclear = (scores - bound).masked_fill(~right, float("inf")).amin(-1) <= border
    tally = Tally(int(swapped.sum()), int(unclear.sum()))
    assert tally.swapped <= tally.unclear, tally
    return tally


def kept_in_lists(index, num_atoms):
    """The selection that lists [M, K] name, which must be in index order."""
    assert (index[:, 1:] > index[:, :-1]).all(), "lists must be in index order"
    kept = torch.zeros(len(index), num_atoms, dtype=torch.bool)
    return kept.scatter(1, index.long(), True)


def kept_above(scores, border, top_k):
    """The selection of a kernel that kept its scores [M, N] and border values [M]."""
    above, equal = scores > border[:, None], scores == border[:, None]
    room = top_k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def follow(case, kept, fires=None, dtype=torch.float64, order=None, gram=False):
    """Output and gradients, by name, of the published equations for a given selection.

    Args:
        kept: the selected atoms [M, N]. fires: those that pass the threshold, None for all.
        dtype: of everything between the inputs and the one rounding at the end.
        order: a seed that makes it a plain run: atoms, features and outputs are summed in an order
            drawn with it (features one by one if it is even), the last rounding of every stage may
            fall either way, and where inputs and atoms have one 16-bit dtype, what meets them in a
            product is rounded to it: the gradient of the scores and, if the output has that dtype
            too, the weighted scores.
        gram: the norm's gradient goes through x (keys^T keys), as it does for large banks.
    """
    tensors = {name: getattr(case, name) for name in LEAVES}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t is not None}
    met = torch.promote_types(case.x.dtype, case.keys.dtype)
    case = replace(case.without_spare_rows(), **leaves)
    keys, values = live(case)
    fires = torch.ones_like(kept) if fires is None else fires
    x, keys, values = case.x.to(dtype), keys.to(dtype), values.to(dtype)

    def rounded(numbers):
        return numbers

    if order is not None:
        generator = torch.Generator().manual_seed(order)
        features = torch.randperm(x.shape[1], generator=generator)
        atoms = torch.randperm(len(keys), generator=generator)
        columns = torch.randperm(values.shape[1], generator=generator)
        x, keys, values = x[:, features], keys[atoms][:, features], values[atoms][:, columns]
        kept, fires = kept[:, atoms], fires[:, atoms]

        def rounded(numbers):
            steps = 2 * torch.rand(numbers.shape, generator=generator, dtype=dtype) - 1
            return numbers * (1 + 2.0**-24 * steps)

    scores = x @ keys.T
    if order is not None and order % 2 == 0:
        scores = scores + (_one_by_one(x, keys) - scores).detach()
    scores = rounded(scores)
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    if gram:
        squares = ((x @ (keys.T @ keys)) * x).sum(-1, keepdim=True)
        half = 0.5 / norm.detach().clamp_min(case.activation.eps)
        norm = norm.detach() + half * (squares - squares.detach())
    norm_scores = rounded(scores / norm.clamp_min(case.activation.eps))
    logits = (norm_scores / case.activation.temperature).masked_fill(~kept, float("-inf"))
    written = rounded(logits.softmax(-1)) * fires * scores
    if order is not None:
        scores.register_hook(lambda grad: _with_bits_of(met, grad))
        low = met if case.residual is None else torch.promote_types(met, case.residual.dtype)
        written = written + (_with_bits_of(low, written) - written).detach()
    update = written @ values
    if order is not None:
        update = update[:, columns.argsort()]
    if case.residual is not None:
        update = case.residual.to(dtype) + update
    like = case.x if case.residual is None else case.residual
    output = update.to(like.dtype)
    grad = torch.ones_like(output) if case.grad is None else case.grad.to(output.dtype)
    output.backward(grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def _with_bits_of(dtype, numbers):
    """Numbers rounded to as many bits as a dtype has, whatever its range."""
    mantissa, exponent = numbers.frexp()
    return torch.ldexp(mantissa.to(dtype).to(numbers.dtype), exponent)


def _one_by_one(x, keys):
    """x keys^T with the features added one after the other, as a kernel may."""
    x, keys = x.detach(), keys.detach()
    total = torch.zeros(len(x), len(keys), dtype=x.dtype)
    for feature in range(x.shape[1]):
        total += x[:, feature, None] * keys[:, feature]
    return total


def fired(case, kept, output):
    """The kept atoms that pass the threshold; truly near ones as the output [M, O] says."""
    activation = case.activation
    if case.training or activation.threshold == 0:
        return None
    scores = exact_scores(case)[0]
    norm = scores.norm(dim=-1, keepdim=True).clamp_min(activation.eps)
    distance = scores / norm - activation.threshold
    fires = distance >= 0
    for row in ((distance.abs() < NEAR) & kept).any(-1).nonzero().squeeze(-1).tolist():
        near = ((distance[row].abs() < NEAR) & kept[row]).nonzero().squeeze(-1)
        one = _row(case, row).to(torch.float64)
        best = float("inf")
        for choice in product((False, True), repeat=len(near)):
            trial = fires[row].clone()
            trial[near] = torch.tensor(choice)
            found = follow(one, kept[row : row + 1], trial[None])["output"]
            error = (found - output[row].double()).abs().max().item()
            if error < best:
                best, fires[row] = error, trial
    return fires


def check_values(actual, case, kept, gram=False):
    """Assert that output and gradients follow from a selection, within the error budget.

    actual: results by name, as `follow` gives them; gram: as there, for every other plain run.
    """
    fires = fired(case, kept, actual["output"])
    high = follow(case.to(torch.float64), kept, fires)
    lows = []
    for name in actual:
        for count in PLAIN_RUNS:
            lows += [
                follow(case, kept, fires, torch.float32, order, gram and order % 2 == 1)
                for order in range(len(lows), count)
            ]
            low = max((run[name] for run in lows), key=lambda low, n=name: _rms(low - high[n]))
            try:
                assert_within_budget(actual[name], low, high[name])
                break
            except AssertionError as error:
                if count == PLAIN_RUNS[-1]:
                    raise AssertionError(f"{name}: {error}") from None


def _row(case, row):
    parts = {n: getattr(case, n) for n in ("x", "residual", "grad")}
    return replace(case, **{n: None if t is None else t[row : row + 1] for n, t in parts.items()})


def _rms(tensor):
    return tensor.square().mean()


def assert_product(actual, left, right, base=None):
    """Assert that actual is base + left right, summed in float32 and rounded once."""
    left, right = left.double(), right.double()
    high, bound = left @ right, left.abs() @ right.abs()
    if base is not None:
        high, bound = high + base.double(), bound + base.double().abs()
    assert actual.shape == high.shape, (actual.shape, high.shape)
    allowed = 2.0**-22 * bound + torch.finfo(actual.dtype).eps * high.abs()
    excess = (actual.double() - high).abs() - allowed
    assert (excess <= 0).all(), f"{excess.max():.3e} over the bound"
