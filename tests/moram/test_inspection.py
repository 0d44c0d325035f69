"""`moram.inspection`: which atoms fire for which task. The command is in test_inspect_run.py."""

import math
import subprocess
import sys

import pytest
import torch
from inspection_support import INPUTS, RULE, Lookup, lookup
from tiny_models import fill_values, language_model, small_config, token_ids
from torch import nn

import moram
from moram import MoRAMConfig, adapters
from moram.harness.inspection.plot import layer_grid
from moram.inspection import Reading, find_adapter, inspect_atoms, token_atoms


def trained_language_model(**settings):
    """A tiny Llama with adapters after three tasks."""
    model = language_model()
    generator = torch.Generator().manual_seed(0)
    moram.inject(model, small_config(**settings), generator=generator)
    for task in range(3):
        if task:
            moram.grow(model, generator=generator)
        fill_values(model, seed=task)
    return model.eval()


def num_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def near(found, rows):
    expected = torch.tensor(rows, dtype=torch.float64)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_weights_shares_reuse_and_dead_atoms_are_those_counted_by_hand():
    report = inspect_atoms(lookup(), INPUTS, ["one", "two"])
    path = "layers.first"
    assert report.paths == (path,) and report.num_tokens == (3, 2)
    # Token 1 gives atom 0 3/4, token 3 gives atom 2 3/4, token 5 gives both 1/2.
    assert near(report.weights[path], [[2 / 3, 0, 1 / 6, 0], [1 / 4, 0, 5 / 8, 0]])
    assert near(report.fired[path], [[1, 0, 1 / 3, 0], [1 / 2, 0, 1, 0]])
    assert near(report.share(), [[80, 20], [200 / 7, 500 / 7]])
    assert near(report.reuse(), [0, 200 / 7])
    assert near(report.num_fired(), [4 / 3, 3 / 2])
    assert report.dead(path) == (1, 3)
    assert report.num_dead() == [(1, 2), (1, 2)]
    assert report.separation(path) == pytest.approx(0.8 - 2 / 7)


def two_readings(model):
    """Places of two kinds, 3 and 2 of them, and a sixth that does not count; two calls."""
    rows = [([[1, 4, 3]], [[0, 1, -1]]), ([[0, 3, 5]], [[0, 0, 1]])]
    ids = [(torch.tensor(ids), torch.tensor(kinds)) for ids, kinds in rows]
    return [Reading(lambda i=i: model(i, None, False), kinds) for i, kinds in ids]


def test_places_of_several_kinds_are_those_counted_by_hand():
    model = lookup(("first", "second"), (range(4), (1, 1, 1, 1)))
    with torch.no_grad():
        for layer in model.layers.values():
            layer.base_layer.weight.copy_(2 * torch.eye(4))
            layer.base_layer.bias.zero_()
            layer.bank.frozen_values[:2] = torch.tensor([[0, 4, 0, 0], [0, 0, 0, 0.0]])
    report = inspect_atoms(
        model, {"one": two_readings(model)}, ["one", "two"], kinds=["left", "right"]
    )
    assert report.kinds == ("left", "right") and report.num_tokens == (5,)
    places = report.places["layers.first"]
    assert near(places.num, [[3, 2]]) and near(places.fired, [[3, 2]])
    # Token 1 gives atom 0 3/4 of a score of 1: 3/4 x 4 = 3. Token 5 gives it 1/2: 2. The base
    # doubles inputs, whose squares are 1, but 2 of token 5.
    assert near(places.update, [[9, 4]]) and near(places.output, [[12, 12]])
    paths = ["layers.first"]
    root = math.sqrt
    expected = [100 * root(9 / 12), 100 * root(4 / 12), 100 * root(13 / 24)]
    assert near(report.strength(paths), [expected])
    # All atoms of the second layer look along the second axis, on which no token of these lies.
    assert near(report.fired_places(["layers.second"]), [[0, 0, 0]])
    assert near(report.fired_places(), [[50, 50, 50]])


def test_an_adapter_without_places_of_a_kind_has_no_number_of_it():
    model = lookup()
    report = inspect_atoms(model, INPUTS, ["one", "two"], kinds=["token", "patch"])
    assert near(report.fired_places()[:, [0, 2]], [[100, 100], [100, 100]])
    assert report.fired_places()[:, 1].isnan().all() and report.strength()[:, 1].isnan().all()


def test_numbers_over_all_adapters_are_the_mean_of_each():
    model = lookup(("first", "second"), (range(4), (2, 3, 0, 1)))
    report = inspect_atoms(model, INPUTS, ["one", "two"])
    assert near(report.share("layers.second"), [[20, 80], [500 / 7, 200 / 7]])
    assert near(report.share(), [[50, 50], [50, 50]])
    assert near(report.mean_weights()[0], [5 / 12, 0, 5 / 12, 0])
    assert report.num_dead() == [(2, 4), (2, 4)]


def test_the_adapter_whose_atoms_are_the_least_common_separates_best():
    # Every key of "same" is the same: tokens 1 and 3 fire the same atoms there.
    model = lookup(("same", "apart"), ((0, 1, 2, 3), (0, 1, 2, 3)))
    with torch.no_grad():
        for keys in model.layers["same"].bank.segments()[::2]:
            keys.fill_(1)
    tokens = {"one": 1, "two": 3}
    batches = {
        name: [(torch.tensor([[token]]), torch.ones(1, 1))] for name, token in tokens.items()
    }
    report = inspect_atoms(model, batches, ["one", "two"])
    assert report.by_separation() == ["layers.apart", "layers.same"]
    assert report.separation("layers.apart") == pytest.approx(1)
    assert report.separation("layers.same") == pytest.approx(0)


def test_atoms_belong_to_tasks_by_the_sizes_given():
    model = lookup(sizes=(1, 3))
    report = inspect_atoms(model, INPUTS, ["one", "two"], sizes=[1, 3])
    assert report.owners["layers.first"].tolist() == [0, 1, 1, 1]
    assert report.num_dead() == [(0, 1), (2, 3)]
    assert near(report.even_reuse(), [0, 25])


def test_an_input_task_that_trained_no_atoms_uses_those_of_earlier_tasks_alone():
    report = inspect_atoms(lookup(), {"new": INPUTS["one"]}, ["one", "two"])
    assert near(report.reuse(), [100])
    assert report.separation("layers.first") == 0


def test_inputs_may_reach_an_adapter_as_one_list_of_rows():
    model = lookup()
    expected = inspect_atoms(model, INPUTS, ["one", "two"])
    model.embed = nn.Sequential(model.embed, nn.Flatten(0, 1))
    report = inspect_atoms(model, INPUTS, ["one", "two"])
    assert torch.equal(report.weights["layers.first"], expected.weights["layers.first"])


def test_an_adapter_that_runs_twice_counts_the_mean_of_both():
    model = lookup()
    expected = inspect_atoms(model, INPUTS, ["one", "two"])
    model.layers["again"] = model.layers["first"]
    report = inspect_atoms(model, INPUTS, ["one", "two"])
    assert torch.equal(report.weights["layers.first"], expected.weights["layers.first"])
    assert report.num_tokens == (3, 2)


def test_frozen_atoms_are_counted_like_current_ones():
    model = lookup()
    before = inspect_atoms(model, INPUTS, ["one", "two"])
    adapters(model)["layers.first"].bank.freeze()
    after = inspect_atoms(model, INPUTS, ["one", "two"])
    assert torch.equal(before.weights["layers.first"], after.weights["layers.first"])


def test_the_last_positions_are_those_before_the_padding_on_either_side():
    report = inspect_atoms(lookup(), INPUTS, ["one", "two"], last=1)
    assert report.num_tokens == (1, 1)
    assert near(report.weights["layers.first"], [[1 / 2, 0, 1 / 2, 0]] * 2)
    report = inspect_atoms(lookup(), INPUTS, ["one", "two"], last=2)
    assert near(report.weights["layers.first"][0], [5 / 8, 0, 1 / 4, 0])
    longer = inspect_atoms(lookup(), INPUTS, ["one", "two"], last=9)
    assert longer.num_tokens == (3, 2)


def test_an_input_without_any_fired_atom_has_shares_of_zero():
    model = lookup()
    # A score against four equal keys is 1/2 after the norm, and all four are below 0.6.
    model.layers["first"].configure(MoRAMConfig(**(RULE | {"threshold": 0.6, "top_k": 4})))
    with torch.no_grad():
        for keys in model.layers["first"].bank.segments()[::2]:
            keys.fill_(1)
    report = inspect_atoms(model, INPUTS, ["one", "two"], sizes=[2, 2])
    assert near(report.share(), [[0, 0], [0, 0]]) and report.num_dead() == [(2, 2), (2, 2)]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_a_language_model_gives_what_a_loop_over_its_tokens_gives(threshold):
    model = trained_language_model(threshold=threshold, temperature=0.2, top_k=3)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[0, :2] = mask[3, :5] = 0
    batches = [(token_ids(4, seed=s), mask, None) for s in range(2)]
    inputs = {path: [] for path in adapters(model)}
    for path, adapter in adapters(model).items():
        adapter.register_forward_hook(lambda a, x, y, path=path: inputs[path].append(x[0]))
    for ids, _, _ in batches:
        model(input_ids=ids, attention_mask=mask)
    for adapter in adapters(model).values():
        adapter._forward_hooks.clear()
    # An iterable that can be read once is enough.
    report = inspect_atoms(model, {"b": iter(batches)}, ["a", "b", "c"])
    for path, adapter in adapters(model).items():
        bank, weights, fired = adapter.bank, torch.zeros(12), torch.zeros(12)
        keys = torch.cat([bank.frozen_keys[:8], bank.current_keys.detach()])
        rows = [x[b, t] for x in inputs[path] for b in range(4) for t in range(6) if mask[b, t]]
        for row in rows:
            scores = (keys @ row.detach()).double()
            scores = (scores / scores.norm()).tolist()
            best = sorted(range(12), key=lambda i: -scores[i])[:3]
            total = sum(math.exp(scores[i] / 0.2) for i in best)
            for i in best:
                if scores[i] >= threshold or not threshold:
                    weights[i] += math.exp(scores[i] / 0.2) / total / len(rows)
                    fired[i] += 1 / len(rows)
        assert len(rows) == report.num_tokens[0] == 34
        torch.testing.assert_close(report.weights[path][0].float(), weights)
        torch.testing.assert_close(report.fired[path][0].float(), fired)
        by_task = weights.view(3, 4).sum(1)
        torch.testing.assert_close(report.share(path)[0].float(), 100 * by_task / by_task.sum())


def test_each_token_shows_its_strongest_atoms():
    model = lookup()
    view = token_atoms(model, torch.tensor([1, 5, 4]), "layers.first", ["one", "two"])
    found = [[(atom.task, atom.index, round(atom.weight, 5)) for atom in atoms] for atoms in view]
    assert found == [[("one", 0, 0.75)], [("one", 0, 0.5), ("two", 2, 0.5)], [("two", 3, 0.75)]]
    view = token_atoms(model, torch.tensor([5]), "layers.first", ["one", "two"], top=1)
    assert [[atom.index for atom in atoms] for atoms in view] == [[0]]


def look_at_everything(model):
    """All that this file's functions do with a model."""
    batches = {"b": [(token_ids(), torch.ones(2, 6))]}
    inspect_atoms(model, batches, ["a", "b", "c"])
    token_atoms(model, token_ids()[0], next(iter(adapters(model))), ["a", "b", "c"])


def test_looking_leaves_no_hook_and_the_output_as_it_was_to_the_last_bit():
    model, ids = trained_language_model(), token_ids()
    before = model(ids).logits
    look_at_everything(model)
    assert num_hooks(model) == 0
    assert torch.equal(model(ids).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_looking_uses_eval_mode_and_gives_every_module_its_mode_back():
    model = trained_language_model(threshold=0.3, dropout=0.5)
    batches = {"b": [(token_ids(), torch.ones(2, 6))]}
    expected = inspect_atoms(model, batches, ["a", "b", "c"])
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    report = inspect_atoms(model, batches, ["a", "b", "c"])
    assert [m.training for m in model.modules()] == modes
    for path in report.paths:
        assert torch.equal(report.weights[path], expected.weights[path])


def test_a_run_that_does_not_ask_never_computes_mixture_weights(monkeypatch):
    calls = []
    whole = moram.MoRAMLinear._weigh

    def counted(layer, x):
        calls.append(layer)
        return whole(layer, x)

    monkeypatch.setattr(moram.MoRAMLinear, "_weigh", counted)
    model = trained_language_model()
    look_at_everything(model)
    asked = len(calls)
    model(token_ids())
    # Once for each adapter, once more for the text.
    assert asked == len(calls) == len(adapters(model)) + 1


def test_a_model_that_fails_is_left_without_hooks_and_in_its_mode():
    model = lookup().train()
    batches = {"one": [(torch.tensor([[99]]), torch.ones(1, 1))]}
    with pytest.raises(IndexError):
        inspect_atoms(model, batches, ["one", "two"])
    assert num_hooks(model) == 0 and all(m.training for m in model.modules())


def test_only_some_atoms_for_a_mean_over_adapters_is_refused():
    model = lookup(("first", "second"), (range(4), range(4)))
    report = inspect_atoms(model, INPUTS, ["one", "two"])
    report.weights["layers.second"] = report.weights["layers.second"][:, :3]
    with pytest.raises(ValueError, match=r"must have as many atoms for a mean, got \[3, 4\]"):
        report.mean_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["one"]}, r"1 tasks must add up .* 2 frozen and 2 current, got \[2\]"),
        ({"tasks": "one"}, "tasks must be one or more names, got 'one'"),
        ({"tasks": []}, "tasks must be one or more names"),
        ({"sizes": [4]}, r"sizes must have one entry for each of 2, got \[4\]"),
        ({"sizes": [5, -1]}, "size of two must be >= 0, got -1"),
        ({"last": 0}, "last must be >= 1, got 0"),
        ({"batches": {}}, "batches must hold at least one input task"),
        ({"batches": {"one": []}}, "input task 'one' has no tokens"),
        (
            {"batches": {"one": [(torch.tensor([1]), torch.tensor([1]))]}},
            r"must both be \[B, T\], got \(1,\) and \(1,\)",
        ),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        inspect_atoms(lookup(), **({"batches": INPUTS, "tasks": ["one", "two"]} | change))


def test_what_cannot_be_looked_at_is_said():
    model, tasks = lookup(("first", "second"), (range(4), range(4))), ["one", "two"]
    with pytest.raises(ValueError, match=r"no adapter 'layers.frist'; closest: layers.first"):
        find_adapter(model, "layers.frist")
    with pytest.raises(ValueError, match=r"input_ids must be \[T\] with T >= 1, got \(0,\)"):
        token_atoms(model, torch.tensor([], dtype=torch.int64), "layers.first", tasks)
    with pytest.raises(ValueError, match="model has no MoRAM adapters"):
        inspect_atoms(Lookup(), INPUTS, tasks)
    model.skipped = ("second",)
    with pytest.raises(ValueError, match=r"no input of 'one' reached adapter layers.second"):
        inspect_atoms(model, INPUTS, tasks)
    with pytest.raises(ValueError, match=r"layers.second must read 1 tokens, got none"):
        token_atoms(model, torch.tensor([1]), "layers.second", tasks)
    model.embed = nn.Sequential(model.embed, nn.Flatten(0, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"for each place of the mask \(1, 4\), got \(16,\)"):
        inspect_atoms(model, INPUTS, tasks)


def test_adapters_are_laid_out_by_name_and_layer():
    values = {"m.layers.2.q": 1.0, "m.layers.2.v": 2.0, "m.layers.10.v": 3.0, "head": 4.0}
    names, layers, rows = layer_grid(values)
    assert names == ["q", "v", "head"] and layers == [2, 10, "-"]
    nan = math.nan
    expected = torch.tensor([[1, nan, nan], [2, 3, nan], [nan, nan, 4]])
    torch.testing.assert_close(torch.tensor(rows), expected, equal_nan=True)


def test_adapters_of_two_stacks_of_layers_are_told_apart():
    values = {"image.blocks.0.q": 1.0, "text.blocks.0.q": 2.0, "text.blocks.1.q": 3.0}
    names, layers, rows = layer_grid(values)
    assert names == ["image.blocks q", "text.blocks q"] and layers == [0, 1]
    expected = torch.tensor([[1, math.nan], [2, 3]])
    torch.testing.assert_close(torch.tensor(rows), expected, equal_nan=True)


def test_importing_it_imports_no_model_library():
    code = (
        "import sys, moram.inspection; "
        "print([n for n in ('transformers', 'matplotlib', 'open_clip') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
