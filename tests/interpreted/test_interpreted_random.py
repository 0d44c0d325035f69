"""A thousand random cases on every path: output, gradients and selection follow the recipe."""

from collections import Counter

import pytest
import torch
from draw import KINDS, draw_case
from paths import ALL, call, check_call

CHUNKS, CASES = 20, 50


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases_follow_the_recipe(chunk):
    seen = Counter()
    for seed in range(chunk * CASES, (chunk + 1) * CASES):
        case, path, kind, exact = draw_case(seed, ALL)
        try:
            tally = check_call(case, path, exact=exact)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {path}, {kind}: {error}") from None
        seen.update((path, kind))
        if len(case.x) > 1:
            check_bad_row(case, path, seed)
            seen["bad row"] += 1
        # Ties made on purpose apart, no row has a border that rounding could move.
        if kind in ("plain", "huge atom"):
            assert tally == (0, 0), seed
    assert set(seen) == {*ALL, *KINDS, "bad row"}


def check_bad_row(case, path, seed):
    """A row with inf or NaN in it comes out not finite, and the others bit for bit as without."""
    row, column = seed % len(case.x), seed % case.x.shape[1]
    x = case.x.clone()
    x[row, column] = (float("nan"), float("inf"), -float("inf"))[seed % 3]
    clean, poisoned = call(case, path), call(case, path, x=x)
    others = torch.arange(len(x)) != row
    assert torch.equal(poisoned[others], clean[others]), (seed, path)
    assert not poisoned[row].isfinite().any(), (seed, path)
