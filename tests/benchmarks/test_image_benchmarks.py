"""The benchmarks of image streams: their lists of runs, how runs are shared out, what is timed."""

from argparse import Namespace

import image_speed
import image_streams
import open_clip
import pytest
import runs
import torch
from image_streams import METHODS, PARTS

from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.data.domains import FileSplit
from moram.xtail.plan import XtailPlan
from moram.xtail.report import REPORT
from moram.xtail.settings import make_settings

MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("part", PARTS)
def test_all_runs_of_a_part_are_valid_and_have_a_folder_of_their_own(part):
    runs = list(PARTS[part]())
    assert len({name for name, _, _ in runs}) == len(runs) > 0
    preset = "paper" if part == "vit" else "small"
    common = {"data_dir": "data", "out": "out", "threads": 1, "quiet": True}
    for name, method, changes in runs:
        folder, own = name.split("/")
        assert folder == part and own
        settings = make_settings(preset, method, changes=[common | changes])
        assert (settings.method, settings.preset) == (method, preset)
        # One row is told the task, and says so.
        asks = "moe-given" in name
        assert XtailPlan.build_method(settings).needs_task_id == asks
        # What `run_part` sets itself.
        assert not common.keys() & changes.keys()


@pytest.mark.parametrize("part", ["small", "real"])
def test_streams_compare_every_method_on_the_same_three_seeds(part):
    runs = list(PARTS[part]())
    seeds = {}
    for name, _, changes in runs[:-1]:
        seeds.setdefault(name.rsplit("-seed", 1)[0], []).append(changes["seed"])
    compared = set(METHODS) - (set(image_streams.VARIANTS) if part == "real" else set())
    assert seeds == {f"{part}/{label}": [0, 1, 2] for label in compared}
    assert runs[-1][:2] == (f"{part}/joint", "joint")
    streams_used = {tuple(changes["datasets"]) for _, _, changes in runs}
    assert len(streams_used) == 1
    real = ("digits", "mnist10k", "animals", "vehicles")
    assert part == "small" or streams_used == {real}
    assert not any(changes.get("held_out") for _, _, changes in runs)


def test_the_search_gives_every_method_the_same_rates_and_sees_no_test_image():
    runs, rates = list(PARTS["search"]()), {}
    for name, _, changes in runs:
        rates.setdefault(name.rsplit("-lr", 1)[0], []).append(changes["lr"])
        assert changes["held_out"] is True
        # Not a seed of the comparisons.
        assert changes["seed"] not in image_streams.SEEDS
    more = rates["search/moe-adapters"]
    assert {tuple(found) for found in rates.values()} == {image_streams.RATES, tuple(more)}
    assert tuple(more[:4]) == image_streams.RATES and more[4:] == [5e-3, 1e-2]
    searched = {label.removeprefix("search/") for label in rates}
    assert searched == set(METHODS) - set(image_streams.WITHOUT_RATE)
    learn = {"lora", "moram", "moe-lora", "moe-adapters", "moe-smoothed", "codyra"}
    assert learn <= searched and "zero-shot" not in searched


def test_how_long_to_train_is_asked_of_images_that_no_table_scores():
    runs = list(PARTS["steps"]())
    for _, _, changes in runs:
        assert changes["held_out"] is True and changes["seed"] not in image_streams.SEEDS
        # The published number of steps.
        assert changes["iterations"] == make_settings("paper", "moram").iterations == 500
    assert [method for _, method, _ in runs] == ["lora", "moram"]


def test_a_part_does_every_run_with_its_changes_and_those_of_the_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "sweep", lambda *arguments: asked.append(arguments))
    arguments = Namespace(part="vit", data="d", out=tmp_path, shard="1/2", only="lora", threads=3)
    runs.run_part(arguments, PARTS, "run", REPORT, "paper")
    ((planned, out, run, report, share, only),) = asked
    assert (out, run, report, share, only) == (tmp_path / "vit", "run", REPORT, (1, 2), "lora")
    wanted = list(PARTS["vit"]())
    assert [name for name, _ in planned] == [name for name, _, _ in wanted]
    for (name, settings), (_, method, changes) in zip(planned, wanted, strict=True):
        assert (settings.method, settings.out) == (method, str(tmp_path / name))
        assert (settings.data_dir, settings.threads, settings.quiet) == ("d", 3, True)
        assert settings.iterations == changes["iterations"] and settings.shots == 16


def test_compare_takes_turns_and_gives_medians_and_their_ratio(monkeypatch):
    calls, times = [], iter([9.0, 1.0, 6.0, 3.0, 8.0, 2.0, 7.0, 4.0, 5.0, 1.0])

    def scripted(function):
        function()
        return next(times)

    monkeypatch.setattr(image_speed, "seconds", scripted)
    row = image_speed.compare("x", lambda: calls.append("plain"), lambda: calls.append("saving"))
    # Medians of 9, 6, 8, 7, 5 and of 1, 3, 2, 4, 1.
    assert row == ("x", "7.0000", "2.0000", "3.5")
    assert calls == ["plain", "saving"] * 6


@pytest.fixture
def small_speed(monkeypatch, tmp_path):
    """The split and a tiny CLIP, with few images."""
    for name, value in {"IMAGES": 6, "CLASSES": 3, "BATCH": 4, "ROUNDS": 2}.items():
        monkeypatch.setattr(image_speed, name, value)
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()

    def tokenize(texts):
        return torch.arange(1, 9).repeat(len(texts), 1)

    return image_speed.write_images(tmp_path), Clip(model, tokenize, Preprocess(16, MEAN, STD))


def counted(monkeypatch, kind, name):
    """Patch a method to count its calls in the list that is returned."""
    calls, pure = [], getattr(kind, name)

    def call(*arguments):
        calls.append(name)
        return pure(*arguments)

    monkeypatch.setattr(kind, name, call)
    return calls


def test_speed_is_measured_on_jpegs_of_the_size_it_says(small_speed):
    split, _ = small_speed
    assert len(split) == 6 and split.labels == [0, 1, 2, 0, 1, 2]
    assert {split.load(i).size for i in range(6)} == {(500, 375)}


# One call before two rounds; six images in batches of four and two.
def test_kept_images_are_decoded_once(small_speed, monkeypatch):
    decoded = counted(monkeypatch, FileSplit, "load")
    assert len(image_speed.decoding(*small_speed)) == 4
    assert len(decoded) == 6 * 3 + 6


def test_kept_features_are_encoded_once(small_speed, monkeypatch):
    encoded = counted(monkeypatch, Clip, "encode_image")
    image_speed.features(*small_speed)
    assert len(encoded) == 2 * 3 + 2


def test_steps_with_kept_prompts_encode_none(small_speed, monkeypatch):
    encoded = counted(monkeypatch, Clip, "encode_text")
    row = image_speed.prompts(*small_speed)
    assert row[0].startswith("step with 3 prompts")
    # A first step and two rounds without keeping; the other finds what the first left.
    assert len(encoded) == 3
