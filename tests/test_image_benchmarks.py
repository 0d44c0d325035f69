"""The benchmarks of image streams: their lists of runs, how runs are shared out, what is timed."""

import json
from argparse import Namespace
from pathlib import Path

import image_speed
import image_streams
import open_clip
import pytest
import streams
import torch
from image_streams import METHODS, PARTS

from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.domains import FileSplit
from moram.xtail.plan import build_method
from moram.xtail.settings import make_settings

NAMES = ("a", "b", "c", "d", "e")
RUNS = [(f"part/{name}", f"method-{name}", {"rank": i}) for i, name in enumerate(NAMES)]
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
        assert not build_method(settings).needs_task_id
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
    assert {tuple(found) for found in rates.values()} == {image_streams.RATES}
    searched = {label.removeprefix("search/") for label in rates}
    assert searched == set(METHODS) - set(image_streams.WITHOUT_RATE)
    learn = {"lora", "moram", "moe-lora", "moe-adapters", "codyra"}
    assert learn <= searched and "zero-shot" not in searched


class Report:
    """Stands for moram.xtail.report."""

    def __init__(self):
        self.written = []

    def read_results(self, folders):
        return [json.loads((folder / "results.json").read_text()) for folder in folders]

    def write_report(self, results, out):
        assert len(results) == len(RUNS)
        self.written.append(out)


class Work:
    """Does runs as `run_part` asks for them: a fake run that writes what a real one does."""

    def __init__(self, out, data="/some/where/data", complete=True):
        self.out, self.data, self.complete = out, data, complete
        self.done, self.report = [], Report()

    def run(self, method, changes):
        self.done.append((method, changes))
        folder = Path(changes["out"])
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"state")
        settings = {"data_dir": changes["data_dir"], "out": changes["out"]}
        results = {"complete": self.complete, "method": method, "settings": settings}
        results["summary"] = {"average": 61.2345}
        (folder / "results.json").write_text(json.dumps(results))
        return results

    def part(self, shard="0/1", only=""):
        """Returns the names of the runs that were done."""
        before = len(self.done)
        arguments = Namespace(
            part="part", data=self.data, out=self.out, shard=shard, only=only, threads=3
        )
        streams.run_part(arguments, RUNS, self.run, self.report, "data_dir")
        return [method.removeprefix("method-") for method, _ in self.done[before:]]


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path / "out")


def test_a_part_does_every_run_once_with_its_changes(work, capsys):
    assert work.part() == list(NAMES)
    for i, (method, changes) in enumerate(work.done):
        folder = work.out / "part" / NAMES[i]
        assert method == f"method-{NAMES[i]}"
        assert changes == {
            "data_dir": "/some/where/data",
            "out": str(folder),
            "threads": 3,
            "quiet": True,
            "rank": i,
        }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [name for name, _, _ in RUNS]
    assert all("{'average': 61.2}" in line for line in lines)


def test_finished_runs_are_skipped_and_unfinished_ones_done_again(work):
    work.part()
    assert work.part() == []
    half = work.out / "part" / "c" / "results.json"
    half.write_text(half.read_text().replace("true", "false"))
    (work.out / "part" / "d" / "results.json").unlink()
    for name in ("c", "d"):
        # The fake run makes its folder anew.
        for path in (work.out / "part" / name).iterdir():
            path.unlink()
        (work.out / "part" / name).rmdir()
    assert work.part() == ["c", "d"]


def test_a_run_is_finished_when_its_results_say_so(tmp_path):
    assert not streams.finished(tmp_path / "none")
    for complete in (False, True):
        (tmp_path / "results.json").write_text(json.dumps({"complete": complete}))
        assert streams.finished(tmp_path) is complete


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_do_every_run_once_between_them(tmp_path, count):
    # Folders of their own: nothing of the others is finished yet.
    shares = [Work(tmp_path / str(i)).part(f"{i}/{count}") for i in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_only_does_the_runs_whose_name_contains_it(work):
    assert work.part(only="part/d") == ["d"]
    assert work.part(only="x") == []


def test_the_table_is_written_when_all_runs_are_there(work):
    work.part("0/2")
    assert work.report.written == [] and not (work.out / "part" / "runs.json").exists()
    work.part("1/2")
    assert work.report.written == [work.out / "part"]
    assert len(json.loads((work.out / "part" / "runs.json").read_text())) == len(NAMES)


def test_incomplete_results_are_no_reason_for_a_table(work):
    work.complete = False
    assert work.part() == list(NAMES)
    assert work.report.written == []


def test_states_are_removed_and_results_stay(work):
    work.part()
    files = [p.relative_to(work.out / "part") for p in work.out.rglob("*") if p.is_file()]
    expected = [Path(name, "results.json") for name in NAMES]
    assert sorted(files) == sorted([*expected, Path("runs.json")])


@pytest.mark.parametrize(("data", "name"), [("/some/where/data", "data"), ("", "")])
def test_runs_json_says_no_path_of_this_machine(tmp_path, data, name):
    work = Work(tmp_path / "out", data)
    work.part()
    text = (work.out / "part" / "runs.json").read_text()
    assert "/some" not in text and str(tmp_path) not in text
    found = json.loads(text)
    assert [run["settings"]["out"] for run in found] == list(NAMES)
    assert {run["settings"]["data_dir"] for run in found} == {name}
    # The runs' own results are left as they were.
    kept = json.loads((work.out / "part" / "a" / "results.json").read_text())
    assert kept["settings"] == {"data_dir": data, "out": str(work.out / "part" / "a")}


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
