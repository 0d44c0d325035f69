"""Many runs in one command: each in its folder, shared out, gone on with, and one table of all."""

import json
import re

import pytest
from toy_benchmark import ToyReport, ToySettings, run_toy
from trace_support import settings_for as trace_settings
from trace_support import write_data, write_model

from moram.cli import main
from moram.harness.run import Stopped
from moram.harness.sweep import expand, is_finished, methods_of, share_of, sweep
from moram.methods import METHODS
from moram.trace.settings import TraceSettings
from moram.xtail.settings import XtailSettings

NAMES = tuple(f"{method}-seed{seed}" for seed in (0, 1) for method in ("lora", "zero-shot"))


def runs_in(out, methods=("lora", "zero-shot"), seeds=(0, 1), **changes):
    def make(own):
        common = {"out": str(out), "quiet": True, "tasks": ("north", "east"), "epochs": 1}
        return ToySettings.make("paper", changes=[common | changes, own])

    return expand(make, methods, seeds)


class Work:
    """Does sweeps of the toy, and notes which runs were done and what was said."""

    def __init__(self, out, stop=lambda: False, **changes):
        self.out, self.stop, self.changes = out, stop, changes
        self.done, self.said = [], []

    def run(self, settings):
        self.done.append(settings.out.rsplit("/", 1)[1])
        return run_toy(settings, stop=self.stop)

    def sweep(self, share=(0, 1), only=""):
        """The names of the runs that were done, and whether the table was written."""
        before = len(self.done)
        runs = runs_in(self.out, **self.changes)
        written = sweep(runs, self.out, self.run, ToyReport(), share, only, self.said.append)
        return self.done[before:], written


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines)}


def test_every_run_has_its_folder_and_the_table_has_their_mean_and_spread(tmp_path):
    work = Work(tmp_path / "out")
    assert work.sweep() == (list(NAMES), True)
    text = (tmp_path / "out" / "table.md").read_text()
    assert work.said[-1] == text and len(work.said) == len(NAMES) + 1
    assert [line.split(":")[0] for line in work.said[:-1]] == list(NAMES)
    rows = rows_of(text)
    found = [json.loads((tmp_path / "out" / n / "results.json").read_text()) for n in NAMES]
    # Two numbers lie |x - y| / sqrt(2) from their mean.
    one, other = (run["matrix"][-1][0] for run in found if run["method"] == "lora")
    expected = f"{(one + other) / 2:.1f} ± {abs(one - other) / 2**0.5:.1f}"
    assert [cell.strip() for cell in rows["sequential LoRA"][:2]] == ["2", expected]
    assert [cell.strip() for cell in rows["zero-shot"][:1]] == ["2"]


def test_the_same_command_does_what_is_missing_and_goes_on_with_what_was_stopped(tmp_path):
    # Two answers of the untouched model, 4 steps and an answer each, all over the first run.
    asked = []
    work = Work(tmp_path / "out", stop=lambda: asked.append(True) or len(asked) == 5)
    with pytest.raises(Stopped, match="stopped in task 1, step 3"):
        work.sweep()
    assert not (tmp_path / "out" / "table.md").exists()
    assert work.sweep() == (list(NAMES), True)
    assert work.sweep() == ([], True)
    alone = Work(tmp_path / "alone")
    alone.sweep()
    paths = [tmp_path / name / NAMES[0] / "results.json" for name in ("out", "alone")]
    one, other = (json.loads(path.read_text()) for path in paths)
    assert one["matrix"] == other["matrix"]


def test_a_run_that_fails_is_named_and_the_others_are_done(tmp_path):
    work = Work(tmp_path / "out")
    run = work.run

    def fail_once(settings):
        if settings.out.endswith(NAMES[1]):
            raise ValueError("no such thing")
        return run(settings)

    work.run = fail_once
    with pytest.raises(RuntimeError, match=f"1 of 4 runs failed; {NAMES[1]}: no such thing"):
        work.sweep()
    assert work.done == [name for name in NAMES if name != NAMES[1]]
    assert f"{NAMES[1]} failed: no such thing" in work.said
    assert not (tmp_path / "out" / "table.md").exists()
    work.run = run
    assert work.sweep() == ([NAMES[1]], True)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_do_every_run_once_between_them(tmp_path, count):
    work = Work(tmp_path / "out", methods=("zero-shot", "joint"))
    shares = [work.sweep((i, count)) for i in range(count)]
    assert sorted(name for done, _ in shares for name in done) == sorted(work.done)
    assert len(set(work.done)) == 4
    sizes = [len(done) for done, _ in shares]
    assert max(sizes) - min(sizes) <= 1
    # The one that finds all of them finished writes the table.
    assert [written for done, written in shares if done][:-1] == [False] * (min(count, 4) - 1)
    assert (tmp_path / "out" / "table.md").exists()


def test_only_does_the_runs_whose_name_contains_it_and_no_table(tmp_path):
    work = Work(tmp_path / "out", methods=("zero-shot", "joint"))
    assert work.sweep(only="joint") == (["joint-seed0", "joint-seed1"], False)
    assert work.sweep(only="x") == ([], False)


def test_a_run_is_finished_when_its_results_say_so(tmp_path):
    assert not is_finished(tmp_path / "none")
    for complete in (False, True):
        (tmp_path / "results.json").write_text(json.dumps({"complete": complete}))
        assert is_finished(tmp_path) is complete


def test_states_are_removed_and_runs_json_says_no_path_of_this_machine(tmp_path):
    work = Work(tmp_path / "out", methods=("zero-shot",), data="/some/where/points")
    work.sweep()
    assert not list((tmp_path / "out").rglob("state.pt"))
    text = (tmp_path / "out" / "runs.json").read_text()
    assert "/some" not in text and str(tmp_path) not in text
    found = json.loads(text)
    assert [run["settings"]["out"] for run in found] == ["zero-shot-seed0", "zero-shot-seed1"]
    assert {run["settings"]["data"] for run in found} == {"points"}
    # The runs' own results are left as they were.
    kept = json.loads((tmp_path / "out" / "zero-shot-seed0" / "results.json").read_text())
    assert kept["settings"]["data"] == "/some/where/points"


def test_all_are_the_methods_that_fit_a_benchmark():
    trace, xtail = (methods_of(kind.methods(), "all") for kind in (TraceSettings, XtailSettings))
    for_clip = {"moe-adapters", "dac", "lada", "rail-primal", "rail-dual"}
    assert set(trace) == set(METHODS) - for_clip
    assert set(xtail) == set(METHODS) - {"in-context", "task-lora"}
    assert methods_of(TraceSettings.methods(), "ewc, lora") == ["ewc", "lora"]


@pytest.mark.parametrize(
    ("names", "got"), [("moran", "moran"), ("lora,rail-dual", "rail-dual"), (",", ","), ("", "")]
)
def test_a_method_that_does_not_fit_is_named(names, got):
    message = f"invalid choice: {got!r} (choose from all, moram, lora, "
    with pytest.raises(ValueError, match=re.escape(message)):
        methods_of(TraceSettings.methods(), names)


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0", ""])
def test_a_shard_that_is_none_is_named(text):
    message = "a shard must be INDEX/COUNT with an index below the count, such as 0/2, got " + repr(
        text
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        share_of(text)
    assert share_of("1/3") == (1, 3)


def test_runs_that_are_the_same_or_take_no_such_argument_are_refused_before_any(tmp_path):
    with pytest.raises(ValueError, match=r"^seeds and methods must differ, got lora-seed1 twice$"):
        runs_in(tmp_path, seeds=(1, 1))
    with pytest.raises(ValueError, match="lora does not take top_k"):
        runs_in(tmp_path, methods=("moram", "lora"), **{"method_args.top_k": 2})


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of a quick `moram trace`."""
    folder = tmp_path_factory.mktemp("inputs")
    model, data = write_model(folder / "model"), write_data(folder / "data", ("letters", "sizes"))
    own = trace_settings(model, data, "unused")
    names = ("rank", "lr", "batch_size", "max_prompt", "max_answer", "pad_multiple")
    names += ("eval_batch", "dtype", "threads", "train_limit")
    given = {name: getattr(own, name) for name in names}
    # So that there is something to share.
    given |= {"first_layer": 1, "cache_prefix": True, "epochs": 1}
    sets = [part for k, v in given.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    common = ["trace", "--preset", "small", "--model", model, "--data", data]
    return [*common, "--tasks", "letters,sizes", "--quiet", *sets]


def test_the_command_runs_methods_and_seeds_and_shares_hidden_states(
    command, tmp_path, capsys, monkeypatch
):
    from moram.trace.prefix import Prefix

    cached, original = [], Prefix.cache
    monkeypatch.setattr(
        Prefix, "cache", lambda *arguments: cached.append(1) or original(*arguments)
    )
    arguments = [*command, "--method", "lora,zero-shot", "--seeds", "0,1"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 0, capsys.readouterr().err
    # The first run keeps what all others read: of each task, whose two splits hold the same.
    assert len(cached) == 2
    rows = rows_of((tmp_path / "out" / "table.md").read_text())
    assert rows["sequential LoRA"][0].strip() == rows["zero-shot"][0].strip() == "2"
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == set(NAMES)
    before = (tmp_path / "out" / NAMES[0] / "results.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / NAMES[0] / "results.json").read_bytes() == before
    # One of the runs may be looked at like any other.
    folder = str(tmp_path / "out" / NAMES[0])
    assert main(["table", folder, "--out", str(tmp_path / "one")]) == 0


def test_one_method_without_seeds_is_one_run_in_out_itself(command, tmp_path):
    assert main([*command, "--method", "zero-shot", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["method"] == "zero-shot"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "moran"], "argument --method: invalid choice: 'moran' (choose from all, "),
        (["--method", "lora,rail-dual"], "argument --method: invalid choice: 'rail-dual'"),
        (["--seeds", "a"], "argument --seeds: invalid seeds value: 'a'"),
        (["--shard", "2/2"], "argument --shard: a shard must be INDEX/COUNT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_malformed_sweeps_exit_with_usage(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main([*command, *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["trace", "xtail"])
def test_both_commands_have_the_same_words(monkeypatch, command):
    asked = []
    monkeypatch.setattr(f"moram.{command}.run.run_{command}", lambda own, **_: asked.append(own))
    names = {"trace": ("model", "data", "tasks"), "xtail": ("backbone", "data_dir", "datasets")}
    words = ["--model", "m", "--data", "d", "--tasks", "a,b", "--held-out"]
    assert main([command, *words]) == 0
    assert main([command, *words[:4], "--set", "tasks=[a, b]", "--held-out"]) == 0
    if command == "xtail":
        older = [
            "--model",
            "m",
            "--data",
            "d",
            "--tasks",
            "a,b",
            "--set",
            "held_out=true",
        ]
        assert main([command, *older]) == 0
    assert len(asked) == 2 + (command == "xtail") and all(own == asked[0] for own in asked)
    assert [getattr(asked[0], name) for name in names[command]] == ["m", "d", ("a", "b")]
    held_out = {"trace": "eval_split", "xtail": "held_out"}[command]
    assert getattr(asked[0], held_out) == {"trace": "held-out", "xtail": True}[command]
