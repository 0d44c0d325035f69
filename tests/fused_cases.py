"""Calls of the fused ops, in the two forms of what they keep for a backward. No tests here."""

import torch
from support import make_case, with_spare_rows

from moram_kernels.triton_backend.plan import fixed_form

WIDTH, OUT, CURRENT = 32, 32, 3
# (top_k, capacity): the fixed form of the first is from scores, of the second from lists.
FORMS = {"dense": (4, 16), "lists": (1, 170)}


def bank_with(form, live, tokens=7, current=CURRENT, **settings):
    """A case with `live` frozen atoms of the capacity that has this form."""
    top_k, capacity = FORMS[form]
    assert fixed_form(capacity, current, WIDTH, top_k) == form
    settings = {"top_k": top_k, "dtype": torch.float32, **settings}
    case = make_case(live, (tokens,), live, current, WIDTH, OUT, **settings)
    return with_spare_rows(case, capacity - live)


def capacity_of(form):
    return FORMS[form][1]


def no_atoms(table):
    return table.new_empty(0, table.shape[1])


def op_arguments(case, save=True, precision="ieee"):
    """Positional arguments of torch.ops.moram.retrieve_fused."""
    current = (case.current_keys, case.current_values)
    if case.current_keys is None:
        current = (no_atoms(case.keys), no_atoms(case.values))
    a = case.activation
    rule = (a.top_k, a.temperature, a.threshold, a.eps, case.training)
    bank = (case.keys, case.values, *current)
    return (case.x, *bank, case.residual, case.num_frozen, *rule, precision, save)


def backward_arguments(case):
    arguments = op_arguments(case)
    _, *saved = torch.ops.moram.retrieve_fused(*arguments)
    x, *bank = arguments[:5]
    return (case.grad, x, *bank, *saved, case.num_frozen, *arguments[7:13])


OP_CASES = {
    "spare": {"live": 11},
    "full": {"live": None},
    "empty": {"live": 0},
    "inference, no residual": {"live": 11, "training": False, "residual": False},
    "one token": {"live": 11, "tokens": 1},
    "no tokens": {"live": 11, "tokens": 0},
    "no current atoms": {"live": 11, "current": 0},
    "no atoms": {"live": 0, "current": 0},
    "half": {"live": 11, "dtype": torch.bfloat16},
}


def case_named(name, form):
    settings = dict(OP_CASES[name])
    live = settings.pop("live")
    return bank_with(form, capacity_of(form) if live is None else live, **settings)


def without(results, name):
    return {n: t for n, t in results.items() if n != name}


def assert_same(actual, expected, tolerance=2e-5):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(
            actual[name].double(),
            tensor.double(),
            rtol=0,
            atol=tolerance * max(1.0, scale),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
