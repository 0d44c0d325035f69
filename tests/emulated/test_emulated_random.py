"""Random calls run compiled: the first of those that the interpreted tests draw."""

import pytest
from draw import draw_case
from paths import ALL, check_call
from test_emulated_operator import ARCHS, emulating

CASES, PARTS = 60, 6


@pytest.mark.emulate
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", ARCHS)
def test_random_calls_have_no_fault_and_follow_the_recipe(arch, part):
    for seed in range(part, CASES, PARTS):
        case, path, kind, exact = draw_case(seed, ALL)
        try:
            with emulating(arch, case):
                check_call(case, path, exact=exact)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {path}, {kind}: {error}") from error
