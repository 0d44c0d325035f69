"""What the probe of image streams reads back from finished runs."""

import csv

import image_probe
import pytest
import torch
from xtail_support import NAMES, TEST, run, tiny_clip, write_domains

from moram.methods.rail import RAILDual


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Finished runs of three methods over three domains of coloured squares."""
    root = tmp_path_factory.mktemp("probe")
    data = write_domains(root / "data")
    found = {}
    for method in ("zero-shot", "lora", "moe-adapters"):
        found[method] = root / method
        run(data, found[method], method)
    return found


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Runs that are read back load the tiny CLIP."""
    monkeypatch.setattr("moram.xtail.run.load_clip", lambda *_: tiny_clip())


def test_the_models_own_texts_score_as_the_run_did(folders):
    for method in ("zero-shot", "lora"):
        read, results = image_probe.read_back(folders[method])
        _, text = image_probe.accuracies(read)
        assert text == pytest.approx(results["matrix"][-1])


@torch.no_grad()
def test_the_probe_is_the_ridge_of_rail_on_all_images_without_its_fusion(folders):
    read, _ = image_probe.read_back(folders["zero-shot"])
    probe, _ = image_probe.accuracies(read)
    rail = RAILDual(fusion=1.0)
    for place in range(len(NAMES)):
        rail.end_task(read.model, place, read.stage((place,)))
    classify = rail.classifier(read.clip, read.prompt_ids)
    for images, offset, found in zip(read.test, read.plan.offsets, probe, strict=True):
        # Where RAIL answers with the regression, its answer is the probe's.
        (batch,) = images.batches(TEST * 9)
        assert classify(batch).shape == (len(images), 9)
        known = read.clip.logits(batch.features(), read.clip.encode_text(read.prompt_ids))
        assert int(known.argmax(1).max()) < rail.learned
        answers = classify(batch).argmax(1)
        assert found == pytest.approx(100 * (answers == images.labels + offset).double().mean())


def test_a_row_a_run(folders, tmp_path):
    out = tmp_path / "probe.csv"
    image_probe.main([*map(str, folders.values()), "--out", str(out)])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["method"] for row in rows] == list(folders)
    for row in rows:
        assert float(row["ms_image"]) > 0 and float(row["s_texts"]) > 0
        # Experts of every task have features of their own.
        assert (row["probe"] == "") == (row["method"] == "moe-adapters")
        filled = [row[f"probe {name}"] != "" for name in NAMES]
        assert filled == [row["method"] != "moe-adapters"] * 3
