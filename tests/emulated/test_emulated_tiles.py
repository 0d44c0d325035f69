"""Every tile and flag that the library ships runs compiled, on sizes that do not fill its tiles."""

import functools
import operator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from configurations import Launch
from oracle import check_values, exact_scores, stable_top
from paths import call, check_call
from shipped_tiles import small_calls
from support import keep_separated, make_case
from test_emulated_operator import ARCHS, ATOMS, changed, emulating

from moram_kernels import fused_ops

PARTS = 20
# A border closer than this to the next score is one that rounding may move.
MARGIN = 2e-6


@functools.cache
def calls(arch):
    return list(small_calls(f"sm_{arch}"))


def case_of(one):
    """Tensors of a `Call`. At inference a quarter of the selected atoms pass the threshold."""
    current = min(one.current, one.atoms)
    how = {"top_k": one.top_k, "temperature": 0.1, "training": one.training}
    sizes = (one.atoms - current, current, one.width, one.out)
    rows = one.tokens if one.training else 3 * one.tokens + 20
    case = make_case(0, (rows,), *sizes, threshold=0.0, dtype=getattr(torch, one.dtype), **how)
    for dtype, names in ((one.result, ("residual", "grad")), (one.bank, ATOMS)):
        if dtype:
            case = changed(case, operator.methodcaller("to", getattr(torch, dtype)), names)
    if one.training:
        return case
    scores = exact_scores(case)[0]
    scores = scores / scores.norm(dim=-1, keepdim=True)
    rank = max(1, min(one.top_k, one.atoms) // 4)
    threshold = scores.topk(rank).values[:, -1].median().item()
    case = replace(case, activation=replace(case.activation, threshold=threshold))
    return keep_separated(case, one.tokens, MARGIN)


def was_made(launch, made):
    """Whether a `configurations.Launch` is among `Launched` ones."""
    return any(
        one.name == launch.kernel.fn.__name__
        and one.constants.items() >= launch.meta.items()
        and set(launch.dtypes) <= one.dtypes
        for one in made
    )


def check(small, arch):
    """Emulate a `SmallCall` and hold it against the oracle; the launches that were not made."""
    case, one = case_of(small.call), small.call
    with emulating(arch, case) as driver, planned(small.plan):
        if one.training:
            check_call(case, one.path, precision=one.precision)
        else:
            output = call(case, one.path, one.precision)
            kept = stable_top(exact_scores(case)[0], one.top_k)
            check_values({"output": output}, case, kept)
    return [form for form, launch in small.wanted.items() if not was_made(launch, driver.launched)]


def planned(plan):
    """Within the block every call follows a plan."""
    return mock.patch.object(fused_ops, "plan", lambda *args, **more: plan)


@pytest.mark.emulate
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_tile_has_no_fault_and_agrees_with_the_oracle(arch, part):
    for small in calls(arch)[part::PARTS]:
        try:
            missing = check(small, arch)
        except Exception as error:
            raise AssertionError(f"{small.name}: {error}") from error
        assert not missing, f"{small.name} made no launch of {missing}"


def test_small_calls_have_every_shipped_form():
    from configurations import shipped

    for arch in ARCHS:
        forms = {launch.form for launch in shipped(f"sm_{arch}").values()}
        assert {form for small in calls(arch) for form in small.wanted} == forms


def test_launch_of_another_tile_is_not_the_wanted_one():
    small = next(one for one in calls(80) if one.call.path == "decode")
    form, launch = next(iter(small.wanted.items()))
    with emulating(80, case_of(small.call)) as driver, planned(small.plan):
        call(case_of(small.call), "decode")
    assert was_made(launch, driver.launched), form
    for name, value in (("num_warps", 8), ("BLOCK_N", 7)):
        other = Launch(launch.kernel, launch.args, launch.meta | {name: value})
        assert not was_made(other, driver.launched)
