"""What can be wrong with a run is one line on stderr and status 1, before anything is trained."""

import json
import shutil

import pytest
import torch
from trace_support import TASKS, settings_for, write_data, write_model

from moram.cli import main
from moram.harness import files
from moram.methods.train import TaskTrainer
from moram.trace.run import TraceRun, run_trace

QUICK = {"cache_prefix": False, "first_layer": 0, "rank": 4, "epochs": 2, "batch_size": 4}
QUICK |= {"train_limit": None, "max_prompt": 24, "max_answer": 4, "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return write_model(folder / "model"), write_data(folder / "data")


@pytest.fixture
def refused(inputs, tmp_path, monkeypatch, capsys):
    """Run `moram trace`, which must end before any training; returns what it says."""

    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(TaskTrainer, "run", fail)
    capsys.readouterr()

    def run(*arguments, model=inputs[0], data=inputs[1], out=tmp_path / "out", tasks=TASKS, **sets):
        given = ["trace", "--preset", "small", "--model", model, "--data", str(data), "--quiet"]
        given += ["--tasks", ",".join(tasks), "--out", str(out)]
        given += [p for k, v in (QUICK | sets).items() for p in ("--set", f"{k}={json.dumps(v)}")]
        assert main([*given, *arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        # Libraries may log before it.
        (line,) = (line for line in lines if line.startswith("moram trace: "))
        assert line == lines[-1]
        return line.removeprefix("moram trace: ")

    return run


def broken(folder, split="train", content=None, tasks=TASKS):
    """Data of which one file is missing or holds something else."""
    data = write_data(folder / "broken", tasks)
    path = folder / "broken" / tasks[1] / f"{split}.json"
    path.unlink() if content is None else path.write_bytes(content)
    return data, path


@pytest.mark.parametrize("split", ["train", "test", "eval"])
def test_a_missing_split(refused, tmp_path, split):
    data, path = broken(tmp_path, split)
    line = refused(data=data, eval_split="eval" if split == "eval" else "test")
    assert str(path) in line or f"no colours/{split}.json" in line


def test_a_missing_data_folder_and_task(refused, inputs):
    assert refused(data="/nowhere/data") == (
        "/nowhere/data has no task 'letters' (no letters/train.json); it has: none"
    )
    assert "has no task 'towns'" in refused(tasks=("letters", "towns"))
    assert "it has: colours, letters, sizes" in refused(tasks=("letters", "towns"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"prompt": "p",\n "answer" "a"}]', "is not JSON: Expecting ':' delimiter: line 3"),
        (b'[{"prompt": "p", "answer": "\xe9"}]', "is not JSON: 'utf-8' codec can't decode"),
        (b"[]", "must hold a non-empty list, got list"),
        (b'{"prompt": "p"}', "must hold a non-empty list, got dict"),
        (b'[{"prompt": "p", "answer": ""}]', ': entry 0 must be {"prompt": text, "answer": text}'),
        (b'[{"prompt": "p"}]', ': entry 0 must be {"prompt": text, "answer": text}'),
    ],
    ids=["no JSON", "no UTF-8", "empty list", "no list", "empty answer", "no answer"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_malformed_file(refused, tmp_path, content, message, split):
    data, path = broken(tmp_path, split, content)
    line = refused(data=data)
    assert line.startswith(str(path)) and message in line


def test_texts_longer_than_the_context(refused):
    line = refused(max_prompt=126)
    assert line.startswith("max_prompt 126 and 4 tokens of answer for letters do not fit")
    assert line.endswith("lower max_prompt, max_answer or max_new_tokens, or set fit_context")
    assert "and 125 tokens" in refused(decoding="generate", max_new_tokens=125, max_prompt=4)


def test_a_folder_of_a_run_with_other_settings_lists_those_that_differ(refused, inputs, tmp_path):
    settings = settings_for(*inputs, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings.to_dict()))
    line = refused("--method", "lora", lr=0.125, rank=5)
    assert f"{tmp_path / 'out'} holds a run with other settings" in line
    for part in ("lr: 0.02 -> 0.125", "rank: 4 -> 5", "method: 'moram' -> 'lora'"):
        assert part in line
    assert "tasks" not in line and "quiet" not in line


FOREIGN = ("notes.json", "results.json", "state.pt", "steps.csv", "table.md", "matrix.png")


@pytest.mark.parametrize("name", [*FOREIGN, "predictions/x"])
def test_a_folder_with_foreign_files_is_left_alone(refused, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("[1]")
    line = refused()
    assert line == f"{tmp_path / 'out'} holds files of something else: name another out folder"
    assert path.read_text() == "[1]" and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "config.json is damaged"), ("[]", "holds files of something else")],
)
def test_a_damaged_config_is_named(refused, tmp_path, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(content)
    assert message in refused()


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04half"])
def test_a_damaged_state_is_named(refused, tmp_path, monkeypatch, content):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            TraceRun, "restore", lambda run: (_ for _ in ()).throw(ValueError("far enough"))
        )
        assert refused() == "far enough"
    (out / "state.pt").write_bytes(content)
    assert refused().startswith(f"{out / 'state.pt'} is damaged: ")


def test_an_out_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in refused()
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_is_found_before_training(refused, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    line = refused()
    assert line.startswith(f"{tmp_path / 'out'} has 0 MiB free, and this run writes up to")


@pytest.mark.parametrize("old", [None, "old"], ids=["new", "replaced"])
def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, monkeypatch, old):
    def fail(number):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)
    writers = {
        "text": lambda: files.write_text(path, "new"),
        "JSON": lambda: files.write_json(path, [1]),
        "state": lambda: files.write_state(path, {"a": torch.zeros(3)}),
    }
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        for name, write in writers.items():
            with pytest.raises(OSError, match="No space left"):
                write()
            assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old else []), name
            assert old is None or path.read_text() == old
    writers["text"]()
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        ("moram", "tempreture", "moram does not take tempreture (closest: temperature"),
        ("lora", "top_k", "lora does not take top_k; it takes rank, alpha, "),
        ("zero-shot", "rank", "zero-shot does not take rank; it takes no arguments"),
    ],
)
def test_an_unknown_method_argument(refused, method, argument, message):
    line = refused("--method", method, "--set", f"method_args.{argument}=1")
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lr=fast"], "lr must be a number, got 'fast'"),
        (["--set", "epochs=2.5"], "epochs must be an integer >= 1, got 2.5"),
        (["--set", "batch_size='8'"], "batch_size must be an integer >= 1, got '8'"),
        (["--set", "lr=[1"], "--set takes key=value with a YAML value, got 'lr=[1'"),
        (["--set", "lr"], "--set takes key=value, got 'lr'"),
        (["--set", "epoch=1"], "there is no setting 'epoch'; close: epochs"),
        (["--set", "train_split=eval"], "train_split must be a mapping, got 'eval'"),
        (["--set", "tasks=3"], "tasks must be a list of names, got 3"),
        (["--set", "method=mora"], "method must be one of"),
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'"),
        (["--suite", "standard", "--order", "2"], "give either order or tasks, got letters"),
        (["--set", "method_args.temperature=0"], "temperature must be"),
        (["--set", "method_args.top_k=many"], "top_k must be"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_malformed_setting(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_model_that_does_not_exist_leaves_the_folder_free(refused, inputs, tmp_path):
    line = refused(model="/nowhere/model")
    assert line == "model /nowhere/model is no folder with a config.json"
    # The corrected command does not find a run of another model there.
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_folder_without_a_model(refused, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refused(model=str(folder)) == f"model {folder} is no folder with a config.json"
    (folder / "config.json").write_text("{}")
    assert refused(model=str(folder))


def test_a_model_whose_weights_are_damaged(refused, inputs, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(inputs[0], folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(model=str(folder)).startswith(f"the weights in {folder} cannot be read: ")


def test_an_interrupt_that_does_not_wait_is_status_130(inputs, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moram.trace.run.run_trace", interrupt)
    assert main(["trace", "--model", inputs[0], "--data", inputs[1], "--tasks", "letters"]) == 130
    assert capsys.readouterr().err == "moram trace: interrupted\n"


@pytest.mark.parametrize("method", ["moram", "lora"])
def test_targets_that_no_layer_has(refused, method):
    assert "z_proj" in refused("--method", method, targets=["z_proj"])


def test_a_first_layer_that_the_model_lacks(refused):
    line = refused(first_layer=2)
    assert line == "first_layer must be below the model's 2 layers, got 2"


def test_a_cached_prefix_of_another_family(refused, tmp_path):
    model = write_model(tmp_path / "mistral", family="Mistral")
    line = refused(model=model, first_layer=1, cache_prefix=True)
    assert line.startswith("cache_prefix works for llama, qwen2")
    assert not (tmp_path / "out" / "config.json").exists()


def test_fewer_examples_than_a_batch(refused):
    line = refused(batch_size=17)
    assert line == "letters: 16 training examples are less than one batch of 17"
    assert "letters, colours, sizes: 48" in refused("--method", "joint", batch_size=49)


def test_no_more_examples_than_are_held_out(refused):
    line = refused(eval_split="held-out", held_out=16)
    assert line == "letters has no more than held_out=16 rows"


def test_a_tokenizer_without_an_end(refused, inputs, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(inputs[0], folder)
    for path in folder.glob("*token*.json"):
        content = json.loads(path.read_text())
        content.pop("eos_token", None)
        path.write_text(json.dumps(content))
    assert refused(model=str(folder)) == "the tokenizer has no end-of-text token"


@pytest.fixture
def table_refused(capsys, tmp_path):
    def run(*folders):
        assert main(["table", *map(str, folders), "--out", str(tmp_path / "tables")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("moram table: ") and not (tmp_path / "tables").exists()
        return line.removeprefix("moram table: ")

    return run


def test_tables_of_runs_that_do_not_fit_are_refused(table_refused, inputs, tmp_path, capsys):
    quick = {"epochs": 1, "eval_limit": 2, "train_limit": 4}
    one, other = tmp_path / "one", tmp_path / "other"
    run_trace(settings_for(*inputs, one, "zero-shot", **quick))
    run_trace(settings_for(*inputs, other, "zero-shot", tasks=TASKS[:2], **quick))
    capsys.readouterr()
    assert table_refused(one, tmp_path / "none") == (
        f"{tmp_path / 'none'} does not exist: no run of moram trace or moram xtail ended there"
    )
    assert table_refused(one, other).startswith("runs must share their tasks, got")
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(results | {"complete": False}))
    assert table_refused(other) == f"{other / 'results.json'}: the run is not complete"
    (other / "results.json").write_text("{")
    assert table_refused(other).startswith(f"{other / 'results.json'} is damaged")
    assert main(["table", str(one), "--out", str(tmp_path / "tables")]) == 0
    assert "| zero-shot | 1 |" in capsys.readouterr().out
