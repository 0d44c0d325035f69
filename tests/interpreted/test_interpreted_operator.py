"""`retrieve` on every path of the Triton backend: forward, gradients, layouts and segments."""

from dataclasses import replace

import interpreter
import pytest
import torch
from oracle import check_selection, exact_scores, fired, live
from paths import ALL, TRAINED, call, check_call, forced, run_training, selection
from support import LEAVES, assert_within_budget, laid_out, make_case, run, with_spare_rows

from moram_kernels import SelfActivation, fused_ops, retrieve

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
ALL_PATHS = pytest.mark.parametrize("path", ALL)
TRAINED_PATHS = pytest.mark.parametrize("path", TRAINED)


def a_case(path, seed=0, *, rows=7, frozen=20, current=5, **more):
    """Odd sizes, but for the resident kernel, which is for multiples of 32."""
    width, out = (64, 32) if path == "resident" else (33, 65)
    settings = {"top_k": 4, "temperature": 0.1, "threshold": 0.1, "dtype": F32} | more
    settings.setdefault("training", path != "decode")
    return make_case(seed, (rows,), frozen, current, width, out, **settings)


@TRAINED_PATHS
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("bank", [(20, 0), (0, 20), (20, 5)], ids=str)
def test_segments_and_dtypes(bank, dtype, training, path):
    case = a_case(path, frozen=bank[0], current=bank[1], dtype=dtype, training=training)
    assert check_call(case, path) == (0, 0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("bank", [(20, 0), (0, 20), (20, 5)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_decode_of_segments_and_dtypes(threshold, bank, dtype):
    case = a_case("decode", frozen=bank[0], current=bank[1], dtype=dtype, threshold=threshold)
    assert check_call(case, "decode") == (0, 0)


@ALL_PATHS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_update_of_16_bit_atoms_onto_a_float32_residual_is_as_exact_as_in_torch(dtype, path):
    case = a_case(path, dtype=dtype, training=False)
    case = replace(case, residual=case.residual.float())
    high = run(case.to(torch.float64), "reference", ())["output"]
    low = run(case, "torch", ())["output"]
    assert_within_budget(call(case, path), low, high)


@ALL_PATHS
@pytest.mark.parametrize(
    "dtypes", [(BF16, F32, BF16), (F32, BF16, F32), (BF16, BF16, F32), (F32, F32, BF16)], ids=str
)
def test_mixed_dtypes_of_inputs_atoms_and_residual(dtypes, path):
    case = a_case(path)
    atoms = {n: getattr(case, n) for n in ("keys", "values", "current_keys", "current_values")}
    case = replace(
        case,
        x=case.x.to(dtypes[0]),
        residual=case.residual.to(dtypes[2]),
        grad=case.grad.to(dtypes[2]),
        **{name: tensor.to(dtypes[1]) for name, tensor in atoms.items()},
    )
    check_call(case, path)
    interpreter.products.clear()
    (call if path == "decode" else run_training)(case, path)
    if dtypes[0] == BF16:
        assert not interpreter.products["ieee"], "a mixed product forgoes tensor cores"


@ALL_PATHS
@pytest.mark.parametrize("current", [0, 9, 4], ids=["frozen", "current", "both"])
@pytest.mark.parametrize("top_k", [8, 9], ids=["one-dropped", "all"])
def test_bank_of_about_top_k_atoms_without_residual(top_k, current, path):
    case = a_case(path, frozen=9 - current, current=current, top_k=top_k, residual=False)
    assert check_call(case, path) == (0, 0)


@ALL_PATHS
def test_bf16x6_follows_the_recipe_of_float32(path):
    assert check_call(a_case(path), path, precision="bf16x6") == (0, 0)


@TRAINED_PATHS
@pytest.mark.parametrize(("rows", "dtype"), [(1, F32), (67, F32), (131, BF16)], ids=str)
def test_numbers_of_rows_from_one_to_several_tiles(rows, dtype, path):
    # Lists take a program a row, whatever the number.
    rows = min(rows, 23) if path == "split-gather" else rows
    assert check_call(a_case(path, rows=rows, dtype=dtype), path) == (0, 0)


@ALL_PATHS
def test_one_atom_of_one_feature_and_one_output(path):
    width = 32 if path == "resident" else 1
    case = make_case(
        0, (3,), 0, 1, width, width, top_k=1, dtype=F32, training=path != "decode", residual=False
    )
    check_call(case, path)


@ALL_PATHS
def test_current_rows_right_behind_the_frozen_ones_are_the_same_bank(path):
    case = a_case(path)
    keys, values = live(case)
    joined = replace(
        case, keys=keys[:20], current_keys=keys[20:], values=values[:20], current_values=values[20:]
    )
    assert joined.current_keys.data_ptr() == joined.keys.data_ptr() + joined.keys.nbytes
    check_call(joined, path)
    assert torch.equal(call(joined, path), call(case, path))


@ALL_PATHS
@pytest.mark.parametrize("current", [0, 5])
def test_spare_rows_are_never_read(current, path):
    case = a_case(path, current=current)
    spare = with_spare_rows(case, 6)
    assert spare.keys[20:].isnan().all()
    check_call(spare, path)
    assert torch.equal(call(spare, path), call(case, path))


@ALL_PATHS
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_memory_layout_does_not_matter(layout, path):
    case = a_case(path)
    tensors = {n: getattr(case, n) for n in (*LEAVES, "keys", "values", "grad")}
    case = replace(case, **{n: laid_out(t, layout) for n, t in tensors.items()})
    if layout == "expanded":
        # Atoms that are one row many times tie, and rounding decides; only rows of x repeat.
        case = replace(case, **{n: tensors[n] for n in ("keys", "current_keys")})
    check_call(case, path)


@TRAINED_PATHS
def test_gradient_of_a_sum_has_stride_0(path):
    check_call(replace(a_case(path), grad=None), path)


@TRAINED_PATHS
@pytest.mark.parametrize(
    "wanted", [("x",), ("current_keys", "current_values"), ("residual",)], ids=str
)
def test_gradients_that_nobody_wants_change_no_others(wanted, path):
    case = a_case(path)
    everything, _ = run_training(case, path)
    some, _ = run_training(case, path, wanted=wanted)
    assert set(some) == {"output", *wanted}
    assert all(torch.equal(some[name], everything[name]) for name in some)


@TRAINED_PATHS
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_output_without_gradients_is_the_same(training, path):
    case = a_case(path, training=training)
    results, _ = run_training(case, path)
    assert torch.equal(call(case, path), results["output"])


@TRAINED_PATHS
def test_two_runs_give_the_same_bits(path):
    first, second = (run_training(a_case(path, rows=40), path)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("path", ["split-gather", "split-dense"])
def test_tokens_taken_in_chunks_give_the_same_bits(path, monkeypatch):
    case = a_case(path, rows=19, training=False)
    whole = call(case, path)
    original = fused_ops.plan
    monkeypatch.setattr(fused_ops, "plan", lambda *a, **k: replace(original(*a, **k), chunk=8))
    torch.testing.assert_close(call(case, path), whole, rtol=1e-6, atol=1e-6)
    if path == "split-gather":
        check_call(a_case(path, rows=19), path)


@ALL_PATHS
def test_leading_dimensions_are_flattened(path):
    case = a_case(path, rows=6)
    flat = call(case, path)
    x, residual = case.x.view(2, 3, -1), case.residual.view(2, 3, -1)
    assert torch.equal(call(case, path, x=x, residual=residual), flat.view(2, 3, -1))


@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows_or_no_outputs_need_no_kernel(rows):
    out = 0 if rows else 5
    case = make_case(0, (rows,), 3, 2, 32, out, dtype=F32)
    output = call(case, None, x=case.x.requires_grad_())
    assert output.shape == (rows, out)
    output.sum().backward()
    assert case.x.grad.shape == (rows, 32) and (case.x.grad == 0).all()


def numbers(case, path):
    if path == "decode":
        return {"output": call(case, path)}
    return run_training(case, path)[0]


@ALL_PATHS
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
def test_row_that_is_not_finite_stays_in_its_row(bad, path):
    case = a_case(path)
    clean = numbers(case, path)
    x = case.x.clone()
    x[2, 3], x[5, :] = bad, bad
    others = [0, 1, 3, 4, 6]
    poisoned = numbers(replace(case, x=x), path)
    for name in {"output", "x"} & clean.keys():
        assert torch.equal(poisoned[name][others], clean[name][others]), name
        assert not poisoned[name][[2, 5]].isfinite().any(), name
    assert clean["output"].isfinite().all()


@ALL_PATHS
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
def test_value_that_is_not_finite_reaches_all_tokens_where_all_values_are_multiplied(bad, path):
    # Only the last token selects the last atom: of equal scores the lowest index wins.
    x, values = torch.eye(32)[[0, 1, 2, 31]], torch.ones(32, 32)
    values[31, 7] = bad
    with forced(path):
        out = retrieve(x, torch.eye(32), values, SelfActivation(4), backend="triton")
    expected = torch.ones(4, 32, dtype=torch.bool)
    expected[slice(3, 4) if path in ("split-gather", "decode") else slice(None), 7] = False
    assert torch.equal(out.isfinite(), expected)


@ALL_PATHS
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e12], ids=str)
def test_inputs_near_the_ends_of_float32(scale, path):
    case = a_case(path, rows=5)
    check_call(replace(case, x=case.x * scale), path)


@ALL_PATHS
def test_threshold_compares_exactly_where_scores_are_exact(path):
    # Scores 3, 4 and 0: in units of the norm 0.6 and 0.8; the bounds lie 1e-5 off them.
    width = 32
    keys = torch.zeros(3, width)
    keys[0, 0], keys[1, 1] = 1, 1
    x = torch.zeros(2, width)
    x[0, :2], x[1, :2] = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    for threshold, survivors in ((0.59999, 2), (0.60001, 1), (0.79999, 1), (0.80001, 0)):
        settings = SelfActivation(top_k=4, temperature=0.5, threshold=threshold)
        with forced(path):
            out = retrieve(x, keys, torch.eye(3, width), settings, backend="triton")
        assert (out != 0).sum(-1).tolist() == [survivors, survivors], threshold


@ALL_PATHS
def test_true_near_ties_with_the_threshold_may_fall_either_way(path):
    case = a_case(path, rows=6, training=False, top_k=8, residual=False, frozen=9, current=4)
    scores = exact_scores(case)[0]
    level = (scores / scores.norm(dim=-1, keepdim=True))[1].sort().values[-3].item()
    case = replace(case, activation=SelfActivation(8, 0.1, level))
    check_call(case, path)


def test_output_settles_only_atoms_that_are_near_the_threshold():
    case = a_case("decode", rows=6, training=False, top_k=8, residual=False)
    output, kept = call(case, "decode"), torch.ones(6, 25, dtype=torch.bool)
    scores = exact_scores(case)[0]
    clear = scores / scores.norm(dim=-1, keepdim=True) >= 0.1
    assert torch.equal(fired(case, kept, output + 100), clear)


def test_selection_read_back_is_that_of_float64_where_no_score_is_close():
    case = a_case("split-dense", rows=20)
    leaf = case.x.clone().requires_grad_()
    kept = selection(call(case, "split-dense", x=leaf), case)
    assert check_selection(case, kept) == (0, 0)
    order = exact_scores(case)[0].argsort(dim=-1, descending=True)[:, :4]
    assert torch.equal(kept.nonzero()[:, 1].view(20, 4), order.sort(-1).values)


@TRAINED_PATHS
def test_long_float16_keys_do_not_overflow_in_the_gradient(path):
    case = a_case(path, rows=5, dtype=F32)
    case.keys[3] *= 400
    assert (case.keys[3].square().sum() > torch.finfo(F16).max).item()
    check_call(case.to(F16), path)


@ALL_PATHS
@pytest.mark.parametrize("settings", [(0.03, 1e-38), (1e-27, 1e-12)], ids=str)
def test_zero_rows_stay_zero_whatever_temperature_and_eps(settings, path):
    temperature, eps = settings
    case = a_case(path, rows=3, residual=False)
    case.x[1] = 0
    activation = SelfActivation(case.activation.top_k, temperature, 0.0, eps)
    output = call(replace(case, activation=activation), path)
    assert (output[1] == 0).all() and output.isfinite().all()


@TRAINED_PATHS
def test_an_empty_current_segment_has_empty_gradients(path):
    case = a_case(path, current=1)
    none = [t[:0].clone().requires_grad_() for t in (case.current_keys, case.current_values)]
    with forced(path):
        output = retrieve(
            case.x,
            case.keys,
            case.values,
            case.activation,
            current_keys=none[0],
            current_values=none[1],
            training=True,
            backend="triton",
        )
    grads = torch.autograd.grad(output.sum(), none)
    assert [g.shape for g in grads] == [t.shape for t in none]
