"""What can be wrong with a run over image domains is one line on stderr, before any training."""

import json
import shutil

import pytest
from PIL import Image
from trace_support import settings_for as trace_settings
from trace_support import write_data, write_model
from xtail_data import encoded, write_folders
from xtail_support import (
    NAMES,
    answers,
    picture,
    quick,
    run,
    settings_for,
    write_backbone,
    write_domains,
)

from moram.cli import main
from moram.methods.train import TaskTrainer
from moram.trace.run import run_trace
from moram.xtail.plan import XtailPlan
from moram.xtail.run import XtailRun


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def data(whole, tmp_path):
    """A copy of the domains, to be broken."""
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def command(backbone, data, tmp_path, capsys):
    """Run `moram xtail`; returns its status, what it said, and the lines of its log."""

    def call(*arguments, out=tmp_path / "out", datasets=NAMES, **sets):
        given = quick(data, out, **({"backbone": backbone, "quiet": False} | sets))
        for name in ("out", "datasets"):
            given.pop(name)
        changes = [part for k, v in given.items() for part in ("--set", f"{k}={json.dumps(v)}")]
        names = ["--tasks", ",".join(datasets)]
        capsys.readouterr()
        status = main(["xtail", *names, "--out", str(out), *changes, *arguments])
        said = capsys.readouterr()
        return status, said.err.splitlines(), said.out.splitlines()

    return call


@pytest.fixture
def refused(command, monkeypatch, tmp_path):
    """Run `moram xtail`, which must end before any training and free its folder; what it says."""

    def fail(*_):
        raise AssertionError("something was trained or answered")

    monkeypatch.setattr(TaskTrainer, "run", fail)
    monkeypatch.setattr(XtailRun, "score_task", fail)

    def call(*arguments, **sets):
        status, errors, _ = command(*arguments, **sets)
        assert status == 1
        # Libraries may log before it.
        (line,) = (line for line in errors if line.startswith("moram xtail: "))
        assert line == errors[-1]
        assert not (tmp_path / "out" / "config.json").exists()
        return line.removeprefix("moram xtail: ")

    return call


def test_the_command_runs_where_nothing_is_wrong(command, tmp_path):
    status, errors, lines = command("--method", "lora")
    assert status == 0, errors
    assert "| LoRA | 1 |" in "\n".join(lines).replace("sequential ", "")
    assert not any(line.startswith("moram xtail") for line in errors)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["complete"]


@pytest.mark.parametrize("part", ["fruit", "birds/test", "tools/train"])
def test_a_missing_folder_is_named(refused, data, part):
    shutil.rmtree(data / part)
    line = refused()
    assert line.startswith("1 of 3 datasets cannot be read: ") and str(data / part) in line


def test_a_data_folder_that_does_not_exist_or_was_not_given(refused, tmp_path):
    gone = str(tmp_path / "gone")
    assert refused(data_dir=gone) == f"{gone} is not a folder; it must hold the datasets"
    line = refused(data_dir="")
    assert line.startswith("--data (data_dir) must be given: it holds fruit, birds, tools")


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>", "not an image of a known format"),
    "cut": (picture("birds", 1, "x")[:200], ""),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_decoded_is_named(refused, data, kind, split):
    content, reason = BAD[kind]
    # Five images a class, all of them drawn.
    path = data / "birds" / split / "emu" / "2.png"
    path.write_bytes(content)
    line = refused(shots=5)
    assert line.startswith(f"birds: 1 images cannot be decoded: {path}: {reason}")
    assert line.endswith("With skip_bad they are left out")


def test_all_bad_images_of_a_dataset_are_counted_and_ten_named(refused, data):
    paths = [
        data / "fruit" / "test" / c / f"{i}.png" for c in ("fig", "lime", "plum") for i in range(4)
    ]
    for path in paths:
        path.write_bytes(b"")
    line = refused()
    assert line.startswith("fruit: 12 images cannot be decoded: ")
    assert [str(path) in line for path in paths] == [True] * 10 + [False] * 2


def test_images_that_are_neither_drawn_nor_scored_do_not_matter(command, data, tmp_path):
    plan = XtailPlan(settings_for(data, tmp_path / "out"), log=lambda line: None)
    drawn = {plan.stream[1].train.name(i) for i in range(9)}
    others = [p for p in (data / "birds" / "train").rglob("*.png") if str(p) not in drawn]
    assert len(others) == 6
    # Limited to one test image, the first.
    for path in (*others, data / "birds" / "test" / "emu" / "2.png"):
        path.write_bytes(b"")
    assert command("--method", "lora", eval_limit=1)[0] == 0


@pytest.mark.parametrize("method", ["lora", "rail-primal", "joint"])
def test_bad_images_are_left_out_where_asked_and_counted(command, data, tmp_path, method):
    (data / "birds" / "test" / "emu" / "2.png").write_bytes(b"")
    (data / "birds" / "train" / "auk" / "0.png").write_bytes(b"no")
    args = {"method_args": {"width": 32}} if method == "rail-primal" else {}
    status, _, lines = command("--method", method, "--skip-bad", shots=5, **args)
    assert status == 0
    (line,) = (line for line in lines if "cannot be decoded" in line)
    assert line.startswith("birds: 2 images cannot be decoded: ") and line.endswith("; left out")
    assert "birds: 3 classes, 14 train, 11 test images" in lines
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["test_images"] == [16, 11, 8]
    assert answers(tmp_path / "out", 0, 1)["labels"] == [4] * 4 + [5] * 3 + [6] * 4


def test_a_bad_image_that_is_repeated_counts_once(command, data):
    # Five images for twelve shots: all of them are drawn, most of them twice.
    (data / "birds" / "train" / "emu" / "2.png").write_bytes(b"")
    status, _, lines = command("--method", "lora", "--skip-bad", shots=12)
    assert status == 0
    assert any(line.startswith("birds: 1 images cannot be decoded: ") for line in lines)


def test_a_class_without_a_good_training_image_is_named(refused, data):
    for path in (data / "birds" / "train" / "emu").iterdir():
        path.write_bytes(b"")
    assert refused("--skip-bad") == "birds has no image left of emu"


def test_a_dataset_without_a_good_test_image_is_named(refused, data):
    for path in (data / "birds" / "test").rglob("*.png"):
        path.write_bytes(b"")
    assert refused("--skip-bad") == "birds has no test image left"


def test_zero_shot_does_not_need_its_training_images(command, data):
    for path in (data / "birds" / "train").rglob("*.png"):
        path.write_bytes(b"")
    assert command("--method", "zero-shot")[0] == 0


def test_a_class_without_training_images_is_named(refused, data):
    for path in (data / "birds" / "train" / "emu").iterdir():
        path.unlink()
    message = (
        "birds has no training image of 1 of its 3 classes: 'emu'; add some, or leave the class"
    )
    assert message in refused()


def test_a_class_with_too_few_shots_is_logged_and_its_images_are_repeated(command, data):
    for name in ("0", "1", "2"):
        (data / "birds" / "train" / "emu" / f"{name}.png").unlink()
    status, _, lines = command("--method", "lora")
    assert status == 0
    assert (
        "birds: 1 classes have fewer than 3 training images, the fewest 2; theirs are repeated"
        in lines
    )
    assert "birds: 3 classes, 9 train, 12 test images" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "fruit,birds,fruit"], "datasets must differ, got fruit, birds, fruit"),
        (["--tasks", ","], "datasets must name at least one"),
        (["--set", "lr=fast"], "lr must be a number, got 'fast'"),
        (["--set", "lr=0"], "lr must be finite and > 0, got 0"),
        (["--set", "iterations=2.5"], "iterations must be an integer >= 1, got 2.5"),
        (["--set", "shots=0"], "shots must be >= 1, got 0"),
        (["--set", "seed=-1"], "seed must be >= 0, got -1"),
        (["--set", "eval_limit=0"], "eval_limit must be >= 1, got 0"),
        (["--set", "dropout=1"], "dropout must be in [0, 1), got 1"),
        (["--set", "label_smoothing=-0.1"], "label_smoothing must be in [0, 1), got -0.1"),
        (["--set", "cache_gib=-1"], "cache_gib must be >= 0, got -1"),
        (["--set", "betas=0.9"], "betas must be two numbers in [0, 1), got 0.9"),
        (["--set", "betas=[0.9]"], "betas must be two numbers in [0, 1), got (0.9,)"),
        (["--set", "schedule=sine"], "schedule must be one of linear, constant, cosine"),
        (["--set", "text_loss=maybe"], "text_loss must be true or false, got 'maybe'"),
        (["--set", "lr"], "--set takes key=value, got 'lr'"),
        (["--set", "learning_rates=1"], "there is no setting 'learning_rates'"),
        (["--set", "iteration=1"], "there is no setting 'iteration'; close: iterations"),
        (["--set", "method=codira"], "'codira' (closest: codyra"),
        (["--set", "method_args.tempreture=1"], "moram does not take tempreture (closest: temper"),
        (
            ["--method", "lora", "--set", "method_args.top_k=1"],
            "lora does not take top_k; it takes",
        ),
        (["--method", "zero-shot", "--set", "method_args.x=1"], "it takes no arguments"),
        (
            ["--method", "rail-primal", "--set", "method_args.ridge=0"],
            "ridge must be finite and > 0",
        ),
        (["--set", "method=task-lora"], "task-lora must be told the task"),
        (["--set", "method=in-context"], "in-context is for language models"),
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'"),
        (["--set", "workers=0"], "workers must be >= 1, got 0"),
        (["--set", "device=gpu7"], "gpu7"),
    ],
    ids=lambda value: " ".join(value).replace("--set ", "") if isinstance(value, list) else "",
)
def test_a_malformed_setting(refused, arguments, message):
    assert message in refused(*arguments)


def test_an_unknown_method_is_refused_by_the_parser_too(capsys):
    with pytest.raises(SystemExit) as error:
        main(["xtail", "--method", "moran", "--tasks", "fruit"])
    assert error.value.code == 2 and "invalid choice: 'moran'" in capsys.readouterr().err


def test_an_unknown_dataset_lists_the_published_ones(refused, data):
    line = refused(datasets=("fruit", "eurosta"))
    assert f"{data / 'eurosta' / 'train'}" in line and "check-data" in line


def test_a_folder_that_has_a_drawn_domains_name_is_refused(refused, data):
    write_folders(data, "textures", ("silk", "wool"), train=3, test=2)
    line = refused(datasets=("textures", "fruit"))
    assert line == f"textures is a domain of its own: give {data / 'textures'} another name"


def test_bad_images_of_all_datasets_are_counted_at_once(refused, data):
    counts = {}
    for name in ("fruit", "birds"):
        paths = list((data / name / "test").rglob("*.png"))
        counts[name] = len(paths)
        for path in paths:
            path.write_bytes(b"")
    line = refused()
    for name, count in counts.items():
        assert count > 10 and f"{name}: {count} images cannot be decoded" in line
    # Ten are named for each.
    assert line.count("the file is empty") == 20 and line.count("; ...") == 2


def test_a_path_is_no_dataset(refused):
    assert "must be the name of a folder, got '../data'" in refused(datasets=("../data",))


def test_datasets_that_share_a_prompt_run_and_ties_go_to_the_earlier(command, tmp_path):
    for name, classes in (("zoo", ("gnu", "yak")), ("farm", ("cow", "yak"))):
        write_folders(tmp_path / "shared", name, classes, train=3, test=2)
    names = ("zoo", "farm")
    status, _, lines = command(
        "--method", "zero-shot", datasets=names, data_dir=str(tmp_path / "shared")
    )
    assert status == 0
    assert "zoo and farm both have the prompt 'a photo of a yak.': ties go to zoo" in lines
    given = [a for i in range(2) for a in answers(tmp_path / "out", 0, i, names)["results"]]
    # gnu 0, yak 1, cow 2, yak 3.
    assert 3 not in given and answers(tmp_path / "out", 0, 1, names)["labels"] == [2, 2, 3, 3]


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_every_mode_run(data, tmp_path, mode):
    for path in (data / "tools").rglob("*.png"):
        image = Image.open(path).convert("RGB")
        gray = image.convert("L")
        image = gray.convert("I;16") if mode == "I;16" else image.convert(mode)
        kind = "JPEG" if mode == "CMYK" else "PNG"
        path.with_suffix(".jpg" if mode == "CMYK" else ".png").write_bytes(encoded(image, kind))
        if mode == "CMYK":
            path.unlink()
    results = run(data, tmp_path / "out", "lora", datasets=("tools",))
    assert results["complete"] and results["test_images"] == [8]


def test_a_folder_with_foreign_files_is_left_alone(command, tmp_path):
    path = tmp_path / "out" / "notes.json"
    path.parent.mkdir()
    path.write_text("[1]")
    status, errors, _ = command()
    assert status == 1
    assert errors == [
        f"moram xtail: {tmp_path / 'out'} holds files of something else: name another out folder"
    ]
    assert path.read_text() == "[1]"


def test_an_interrupt_that_does_not_wait_is_status_130(monkeypatch, whole, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moram.xtail.run.run_xtail", interrupt)
    assert main(["xtail", "--data", whole, "--tasks", "fruit"]) == 130
    assert capsys.readouterr().err == "moram xtail: interrupted\n"


def test_a_table_of_both_commands_is_refused(whole, tmp_path, capsys):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "trace data")
    run_trace(trace_settings(model, data, tmp_path / "trace", "zero-shot", eval_limit=2))
    run(whole, tmp_path / "xtail", "zero-shot")
    capsys.readouterr()
    folders = [str(tmp_path / "trace"), str(tmp_path / "xtail")]
    assert main(["table", *folders, "--out", str(tmp_path / "tables")]) == 1
    message = "moram table: one table holds runs of moram trace or of moram xtail, not both\n"
    assert capsys.readouterr().err == message and not (tmp_path / "tables").exists()
    for folder in folders:
        assert main(["table", folder, "--out", str(tmp_path / "tables")]) == 0
        assert "| zero-shot | 1 |" in capsys.readouterr().out
