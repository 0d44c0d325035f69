"""A bank beside PEFT's LoRA in one model: what is compared, and the table that is written."""

import csv

import pytest
import torch
import versus_lora

import moram


@pytest.mark.parametrize("atoms", [8, 16, 40])
def test_banks_hold_the_atoms_that_are_named_and_every_one_has_learned(atoms):
    model = versus_lora.with_atoms(versus_lora.make_model(96, 1), atoms)
    found = moram.adapters(model)
    assert [path.rpartition(".")[2] for path in found] == list(versus_lora.TARGETS)
    for layer in found.values():
        assert (layer.bank.num_current, layer.bank.num_atoms) == (versus_lora.RANK, atoms)
        values = torch.cat([layer.bank.segments()[1], layer.bank.segments()[3]])
        assert values.abs().amax(1).min() > 0


def test_lora_is_of_rank_8_on_the_same_projections_and_changes_the_output():
    base, adapted = (versus_lora.make_model(96, 1) for _ in range(2))
    adapted = versus_lora.with_lora(adapted)
    shapes = {n: tuple(p.shape) for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(shapes) == 2 * len(versus_lora.TARGETS)
    assert {min(shape) for shape in shapes.values()} == {8}
    tokens = torch.arange(5)[None]
    assert (adapted(tokens).logits - base(tokens).logits).abs().max() > 1e-4


def test_a_decoded_token_leaves_the_cache_as_it_was():
    model = versus_lora.with_atoms(versus_lora.make_model(96, 1), 8)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(_[2].logits), always_call=True)
    call = versus_lora.make_call("decode", model, 1, 4)
    for _ in range(3):
        call()
    assert [logits.shape[1] for logits in seen] == [4, 1, 1, 1]
    torch.testing.assert_close(seen[1], seen[3])


def test_training_changes_the_current_atoms_alone():
    model = versus_lora.with_atoms(versus_lora.make_model(96, 1), 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versus_lora.make_call("training", model, 1, 4)()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all("current" in name for name in changed)


def test_rows_name_what_was_measured_and_a_picture_is_drawn(tmp_path):
    out, plot = tmp_path / "found.csv", tmp_path / "found.png"
    flags = ["--atoms", "8,16", "--width", "96", "--layers", "1", "--length", "4", "--batch", "2"]
    versus_lora.main(
        ["--out", str(out), "--plot", str(plot), *flags, "--repeats", "5", "--seconds", "0.1"]
    )
    rows = list(csv.DictReader(out.open()))
    assert [(row["mode"], row["atoms"]) for row in rows] == [
        (mode, atoms) for mode in versus_lora.MODES for atoms in ("8", "16")
    ]
    for row in rows:
        assert float(row["ratio_p20"]) <= float(row["ratio"]) <= float(row["ratio_p80"])
        assert row["repeats"] == "5" and "--atoms 8,16" in row["command"]
        assert row["batch"] == ("1" if row["mode"] == "decode" else "2")
    assert plot.stat().st_size > 1000
