"""What T tasks cost: the layers that are compared, and the table that is written."""

import csv

import pytest
import sum_or_choice
import torch


def test_every_layer_has_learned_as_many_tasks_and_changes_the_output():
    found = sum_or_choice.layers(16, 3)
    assert found["stack"].num_frozen == 2
    assert found["moram"].bank.num_frozen == 2 * sum_or_choice.RANK
    x = torch.randn(4, 16)
    outputs = {name: layer(x) for name, layer in found.items()}
    for name in ("stack", "moram"):
        assert (outputs[name] - outputs["base"]).abs().max() > 0.01


def test_rows_name_what_was_measured_and_what_it_stores(tmp_path):
    out = tmp_path / "found.csv"
    flags = ["--tasks", "1,2", "--tokens", "3", "--width", "16", "--repeats", "5"]
    sum_or_choice.main(["--out", str(out), *flags, "--seconds", "0.1"])
    rows = list(csv.DictReader(out.open()))
    assert [(row["tasks"], row["layer"]) for row in rows] == [
        (str(tasks), layer) for tasks in (1, 2) for layer in ("base", "stack", "moram")
    ]
    for row in rows:
        # Rank 8, 16 features in and out, 4 bytes a number; the bank counts its live rows alone.
        expected = 0 if row["layer"] == "base" else int(row["tasks"]) * 8 * (16 + 16) * 4
        assert int(row["bytes"]) == expected
        assert float(row["us_per_token"]) > 0 and "--tasks 1,2" in row["command"]
        if row["layer"] == "base":
            assert float(row["ratio_to_base"]) == pytest.approx(1)
