"""A thousand random cases on every path: output, gradients and selection follow the recipe."""

from collections import Counter

import pytest
from draw import KINDS, draw_case
from paths import ALL, check_call

CHUNKS, CASES = 20, 50


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases_follow_the_recipe(chunk):
    seen, rows, unclear = Counter(), 0, 0
    for seed in range(chunk * CASES, (chunk + 1) * CASES):
        case, path, kind, exact = draw_case(seed, ALL)
        try:
            tally = check_call(case, path, exact=exact)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {path}, {kind}: {error}") from None
        seen.update((path, kind))
        # Ties made on purpose apart, next to no row's border is closer than the bound.
        if kind in ("plain", "huge atom"):
            rows, unclear = rows + len(case.x), unclear + tally.unclear
            assert tally.swapped == 0, seed
    assert set(seen) == {*ALL, *KINDS}
    assert unclear <= 0.02 * rows
