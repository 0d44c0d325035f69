"""Backend "torch" against backend "reference" in float64: output and every gradient, to 1e-10.

Everything runs twice, as small problems and as large ones (the fixture `route`). The sizes where
routes change are in test_switches.py, lower precisions in test_numbers.py.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support import assert_parity, laid_out, make_case, run, with_spare_rows

from moram_kernels import SelfActivation, retrieve

pytestmark = pytest.mark.usefixtures("route")

# Tokens, atoms, input and output width: ones, primes, powers of two and their neighbours, fewer
# atoms than top_k, and banks on both sides of every switch of the torch backend.
SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 5, 3),
    (1, 64, 16, 1),
    (1, 600, 8, 5),
    (2, 3, 1, 7),
    (3, 5, 17, 1),
    (4, 9, 13, 8),
    (6, 31, 1, 2),
    (7, 2, 4, 4),
    (12, 33, 32, 16),
    (15, 40, 6, 3),
    (16, 8, 8, 8),
    (21, 300, 5, 7),
    (24, 16, 64, 64),
    (30, 17, 11, 13),
    (31, 67, 16, 5),
    (36, 257, 3, 4),
    (40, 128, 96, 40),
    (63, 17, 96, 40),
    (64, 64, 64, 64),
    (65, 37, 19, 23),
    (66, 261, 7, 9),
    (97, 53, 29, 31),
    (128, 101, 16, 16),
    (130, 11, 2, 3),
]
CASES_PER_SHAPE = 24
CHOICES = {
    "top_k": [1, 2, 3, 8, 40],
    "temperature": [0.03, 0.3, 3.0],
    "threshold": [0.0, 0.2, 0.99],
    "training": [True, False],
    "residual": [True, False],
    "integers": [True, False, False],
    "zero_rows": [True, False, False],
    "segments": ["both", "both", "frozen", "current"],
    "lead": ["rows", "grid"],
    "x_layout": ["rows", "transposed", "strided", "expanded"],
    "bank_layout": ["rows", "transposed", "strided"],
    "grad_layout": ["rows", "transposed", "strided", "expanded", "sum"],
    "spare": [None, 0, 3],
}


def draw_options(shape, i):
    rng = random.Random(f"{shape}-{i}")
    return {name: rng.choice(values) for name, values in CHOICES.items()}


def split_atoms(atoms, segments, rng):
    if segments == "frozen" or (atoms == 1 and segments == "both"):
        return atoms, 0
    if segments == "current":
        return 0, atoms
    current = rng.randint(1, min(atoms - 1, 8))
    return atoms - current, current


def random_case(shape, i):
    tokens, atoms, width, out = shape
    o, rng = draw_options(shape, i), random.Random(i)
    frozen, current = split_atoms(atoms, o["segments"], rng)
    lead = (tokens,)
    if o["lead"] == "grid":
        rows = rng.choice([n for n in range(1, tokens + 1) if tokens % n == 0])
        lead = (rows, tokens // rows)
        if tokens == 1:
            lead = ()
    names = ("top_k", "temperature", "threshold", "training", "residual", "integers")
    settings = {name: o[name] for name in names}
    case = make_case(i, lead, frozen, current, width, out, **settings)
    x, keys, values = laid_out(case.x, o["x_layout"]), case.keys, case.values
    if o["zero_rows"]:
        x = laid_out(x * (torch.arange(width * tokens).view(x.shape) % 3 > 0), o["x_layout"])
        x = x * 0 if i % 2 else x
    if o["spare"] is not None:
        padded = with_spare_rows(case, o["spare"])
        case, keys, values = padded, padded.keys, padded.values
    bank = {"keys": keys, "values": values}
    bank.update(current_keys=case.current_keys, current_values=case.current_values)
    bank = {n: None if t is None else laid_out(t, o["bank_layout"]) for n, t in bank.items()}
    grad = None if o["grad_layout"] == "sum" else laid_out(case.grad, o["grad_layout"])
    return replace(case, x=x, grad=grad, **bank)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-D{}-O{}-fp64".format(*s))
def test_torch_agrees_with_reference(shape):
    for i in range(CASES_PER_SHAPE):
        try:
            assert_parity(random_case(shape, i))
        except AssertionError as error:
            raise AssertionError(f"case {i}: {draw_options(shape, i)}") from error


def test_the_random_cases_are_many_and_varied():
    drawn = [draw_options(shape, i) for shape in SHAPES for i in range(CASES_PER_SHAPE)]
    assert len(drawn) >= 500
    seen = Counter((name, value) for options in drawn for name, value in options.items())
    for name, values in CHOICES.items():
        assert all(seen[name, value] >= 80 for value in values), (name, seen)


@pytest.mark.parametrize("current", [0, 3], ids=["frozen-only", "with-current"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("frozen", [5, 100])
def test_no_tokens(lead, frozen, current):
    case = make_case(0, lead, frozen, current, 6, 4)
    assert_parity(case)
    assert run(case, "torch")["output"].shape == (*lead, 4)


@pytest.mark.parametrize("width, out", [(0, 3), (4, 0)], ids=["D0", "O0"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
def test_sizes_of_zero(lead, width, out):
    case = make_case(0, lead, 6, 0, max(width, 1), out)
    case = replace(case, x=case.x[..., :width], keys=case.keys[:, :width])
    output = run(case, "torch")["output"]
    # No inputs, no scores: what is left is the residual.
    torch.testing.assert_close(output, case.residual, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [3, 200], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("frozen", [20, 100], ids=lambda n: f"N{n}")
class TestTies:
    """Equal scores on purpose; integers make the sums exact, so that the keys tie exactly."""

    def case(self, tokens, frozen, **settings):
        settings = {"top_k": 4, "integers": True, **settings}
        return make_case(1, (tokens,), frozen, 6, 5, 3, **settings)

    def test_duplicates_among_frozen_keys(self, tokens, frozen):
        case = self.case(tokens, frozen)
        half = frozen // 2
        assert_parity(replace(case, keys=case.keys[:half].repeat(2, 1)))

    def test_duplicates_across_frozen_and_current_keys(self, tokens, frozen):
        case = self.case(tokens, frozen)
        assert_parity(replace(case, current_keys=case.keys[-6:].clone()))

    def test_every_key_is_the_same(self, tokens, frozen):
        case = self.case(tokens, frozen)
        keys = laid_out(case.keys, "expanded")
        assert_parity(replace(case, keys=keys, current_keys=keys[:6]))

    @pytest.mark.parametrize("wider", [0, 1, 2])
    def test_group_straddles_the_border(self, tokens, frozen, wider):
        # Two atoms win, then four or more tie for the two places left, on both sides of the seam.
        case = self.case(tokens, frozen)
        scores = torch.full((frozen,), -1.0, dtype=torch.float64)
        scores[[3, 11]] = torch.tensor([5.0, 4.0], dtype=torch.float64)
        scores[[7, 2, 15, 1][: 2 + wider]] = 3.0
        current = torch.tensor([3.0, 3.0, 0, 3.0, 0, 0], dtype=torch.float64)
        ones = torch.ones_like(case.x)
        share = case.keys.new_full((1, 5), 0.2)
        spread = torch.zeros(1, 5, dtype=torch.float64).index_fill_(1, torch.tensor([0]), 1.0)
        for row in (share.round() + spread, spread):
            keys, current_keys = scores[:, None] * row, current[:, None] * row
            assert_parity(replace(case, x=ones, keys=keys, current_keys=current_keys))

    def test_lowest_frozen_index_wins_over_current_atoms(self, tokens, frozen):
        case = self.case(tokens, frozen, top_k=1, residual=False)
        x, keys = torch.ones_like(case.x), torch.zeros_like(case.keys)
        keys[9:12] = 2.0
        current_keys = torch.full_like(case.current_keys, 2.0)
        for training in (True, False):
            tied = replace(case, x=x, keys=keys, current_keys=current_keys, training=training)
            # s = 2 * 5 for nine atoms; z = 1/3 passes the threshold of 0.2.
            expected = (10 * case.values[9]).expand(tokens, -1)
            assert torch.equal(run(tied, "torch")["output"], expected)


@pytest.mark.parametrize("wanted", ["x", "current_keys", "current_values", "residual"])
@pytest.mark.parametrize("frozen", [0, 5, 100])
def test_any_single_leaf_may_ask_for_a_gradient(frozen, wanted):
    for tokens in (3, 150):
        assert_parity(make_case(3, (tokens,), frozen, 4, 6, 5), wanted=(wanted,))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("name", ["x", "keys", "values", "current_keys", "current_values"])
@pytest.mark.parametrize("frozen", [12, 300])
def test_memory_layout_does_not_matter(frozen, name, layout):
    case = make_case(2, (70,), frozen, 5, 64, 6, integers=True)
    tensor = laid_out(getattr(case, name), layout)
    assert not tensor.is_contiguous()
    assert_parity(replace(case, **{name: tensor}))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("frozen", [0, 1, 5, 100, 300])
def test_spare_rows_are_never_read(frozen, backend):
    for tokens, training in ((1, False), (3, True), (120, True), (120, False)):
        case = make_case(4, (tokens,), frozen, 3, 6, 5, training=training)
        for spare in (1, 200):
            actual = run(with_spare_rows(case, spare), backend)
            expected = run(case, backend)
            for name, tensor in expected.items():
                assert tensor.isfinite().all() and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("current", [0, 4], ids=["frozen-only", "with-current"])
@pytest.mark.parametrize("frozen", [1, 6, 100, 700], ids=lambda n: f"N{n}")
def test_single_token_inference(frozen, current, guard):
    for i in range(36):
        options = {
            "top_k": (1, 3, 8)[i % 3],
            "threshold": (0.0, 0.2, 0.99)[i // 3 % 3],
            "training": bool(i % 2),
            "integers": i % 5 == 0,
            "residual": i % 4 < 2,
        }
        lead = ((1,), (), (1, 1), (1, 1, 1))[i // 9]
        case = make_case(i, lead, frozen, current, 7, 5, **options)
        case = replace(case, x=case.x * 0) if i == 7 else case
        for layout in ("rows", "strided"):
            bank = {n: laid_out(getattr(case, n), layout) for n in ("keys", "values")}
            spared = with_spare_rows(replace(case, **bank), 2)
            with guard():
                assert_parity(spared, wanted=())


def test_clamped_norm():
    # Half of the rows have a norm below eps, where the division is by a constant.
    for frozen in (6, 100):
        case = make_case(5, (80,), frozen, 4, 6, 5, eps=10.0, top_k=3)
        x = case.x.clone()
        x[::2] *= 100
        norm = (x @ torch.cat([case.keys, case.current_keys]).T).norm(dim=-1)
        assert (norm < 10).any() and (norm > 10).any()
        assert_parity(replace(case, x=x))
        assert_parity(replace(case, x=x, training=False))


def test_tokens_do_not_influence_each_other():
    case = make_case(6, (200,), 100, 4, 6, 5)
    whole = run(case, "torch")["output"]
    settings = {"current_keys": case.current_keys, "current_values": case.current_values}
    for i in (0, 77, 199):
        alone = retrieve(
            case.x[i],
            case.keys,
            case.values,
            case.activation,
            residual=case.residual[i],
            training=True,
            **settings,
        )
        torch.testing.assert_close(alone, whole[i], rtol=1e-12, atol=1e-12)


def test_settings_reach_the_operator():
    case = make_case(8, (40,), 30, 3, 6, 5, training=False, residual=False)
    base = run(case, "torch")["output"]
    for changed in (
        SelfActivation(7, 0.3, 0.2),
        SelfActivation(8, 0.4, 0.2),
        SelfActivation(8, 0.3, 0.3),
        SelfActivation(8, 0.3, 0.2, eps=100.0),
    ):
        other = replace(case, activation=changed)
        assert not torch.allclose(run(other, "torch")["output"], base)
        assert_parity(other)
