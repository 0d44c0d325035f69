"""`MoRAMConfig.alignment`, this project's addition: where atoms write, by hand."""

import pytest
import torch
from tiny_models import fill_values, language_model, small_config, token_ids

import moram
from moram import MoRAMConfig, MoRAMLinear
from moram.inspection import inspect_atoms

RULE = {"top_k": 2, "temperature": 1.0, "threshold": 0.0, "value_scale": 1.0, "atoms_per_task": 1}
# Keys (1, 0) and (0, 2). Highest scores 3 and 2 of two: the first key, cosine 3 / sqrt(10) = 0.95.
# 1 and 2: the second, 2 / (2 sqrt(2)) = 0.71. 0.6 and 1.6: the second, 0.8. No score above 0.
# Half the first input: the cosine stays. Nothing at all.
INPUTS = [[3.0, 1], [1, 1], [0.6, 0.8], [-1, -1], [1.5, 0.5], [0, 0]]
WRITES = {0.0: "yyyyyn", 0.7: "yyynyn", 0.75: "ynynyn", 0.9: "ynnnyn"}


def layer(frozen=1, **settings):
    """Two atoms, the first of which may be frozen."""
    made = MoRAMLinear(2, 3, config=MoRAMConfig(**(RULE | settings)))
    made.bank.grow(1)
    if not frozen:
        made.bank.freeze()
    first, second = torch.tensor([[1.0, 0]]), torch.tensor([[0, 2.0]])
    with torch.no_grad():
        made.bank.frozen_keys[:1] = first
        made.bank.frozen_values[:1] = 1
        if frozen:
            made.bank.current_keys.copy_(second)
            made.bank.current_values.fill_(5)
        else:
            made.bank.frozen_keys[1:2] = second
            made.bank.frozen_values[1:2] = 5
    return made.eval()


@pytest.mark.parametrize("frozen", [1, 0], ids=["one-frozen", "all-frozen"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("alignment", WRITES)
def test_atoms_write_where_the_strongest_key_is_aligned(alignment, backend, frozen):
    made, x = layer(frozen, alignment=alignment, backend=backend), torch.tensor(INPUTS)
    plain = layer(frozen, backend=backend)
    plain.base_layer = made.base_layer
    with torch.no_grad():
        base, whole, found = made.base_layer(x), plain(x), made(x)
        rows = made(x.view(2, 3, 2)).view(6, 3)
    expected = [(whole if w == "y" else base)[i] for i, w in enumerate(WRITES[alignment])]
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(rows, found)
    assert not torch.allclose(whole[0], base[0])


def test_training_lets_all_inputs_through():
    made, x = layer(alignment=0.9).train(), torch.tensor(INPUTS)
    plain = layer().train()
    plain.base_layer = made.base_layer
    assert torch.equal(made(x), plain(x))


def test_looking_in_sees_nothing_fire_where_nothing_writes():
    made = layer(alignment=0.75)
    weights, update = made.fire(torch.tensor(INPUTS))
    # softmax(0.8321, 0.5547), the scores 3 and 2 over sqrt(13).
    assert weights[0].tolist() == pytest.approx([0.5689, 0.4311], abs=1e-4)
    assert weights[[1, 3]].eq(0).all() and update[[1, 3, 5]].eq(0).all()


def test_a_compiled_model_gives_the_same():
    made, x = layer(alignment=0.75), torch.tensor(INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made, backend="eager")(x), made(x))


def test_it_is_saved_with_the_adapters(tmp_path):
    model = language_model()
    moram.inject(model, small_config(alignment=0.4))
    fill_values(model)
    moram.save(model.eval(), tmp_path)
    again = language_model()
    moram.load(again, tmp_path)
    ids = token_ids()
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    for adapter in moram.adapters(model).values():
        adapter.configure(small_config())
    assert not torch.allclose(again(ids).logits, model(ids).logits)


def test_reports_of_a_model_count_fewer_places():
    found = []
    for alignment in (0.0, 0.4):
        model = language_model()
        moram.inject(model, small_config(alignment=alignment), generator=torch.Generator())
        fill_values(model)
        batches = {"a": [(token_ids(), torch.ones(2, 6))]}
        report = inspect_atoms(model, batches, ["a"])
        found.append(report.fired_places()[0, -1].item())
    assert found[1] < found[0] == 100
