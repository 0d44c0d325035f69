"""`moram inspect` on a run of moram trace over a tiny model."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from trace_support import TASKS, make_tokenizer, settings_for, write_data, write_model

import moram
from moram.cli import main
from moram.inspection import inspect_atoms, token_atoms
from moram.trace.run import run_trace

# Of the first adapter of the tiny Llama.
QUERY = "model.layers.0.self_attn.q_proj"
# Scores in units of their norm, in float32: ten times their rounding.
NEAR = 1e-5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of MoRAM."""
    folder = tmp_path_factory.mktemp("inspect")
    model, data = write_model(folder / "model"), write_data(folder / "data")
    run_trace(settings_for(model, data, folder / "run", method_args={"threshold": 0.3}))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


def loaded(run):
    """The run's model, read without the code under test."""
    from transformers import AutoModelForCausalLM

    folder = json.loads((run / "config.json").read_text())["model"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    moram.load(model, run / "adapters")
    return model.eval()


def answered(run, task):
    """What the model reads of the test examples: prompt, space, answer, end; one token a byte."""
    data = json.loads((run / "config.json").read_text())["data"]
    with open(f"{data}/{task}/test.json") as file:
        rows = json.load(file)
    texts = [make_tokenizer()(f"{row['prompt']} {row['answer']}").input_ids for row in rows]
    return [(torch.tensor([[*ids, 1]]), torch.ones(1, len(ids) + 1)) for ids in texts]


def unclear(model, batches):
    """By adapter, in which part of each task's tokens rounding decides on an atom, [tasks, N]."""
    found = {path: [] for path in moram.adapters(model)}

    def watch(adapter, x, path):
        frozen, _, current, _ = adapter.bank.segments()
        scores = x[0].flatten(0, -2).double() @ torch.cat([frozen, current]).double().T
        scores /= scores.norm(dim=-1, keepdim=True)
        top_k, ordered = adapter.config.top_k, scores.sort(dim=-1, descending=True).values
        last, next_one = ordered[:, top_k - 1, None], ordered[:, top_k, None]
        border = (scores < next_one + NEAR) & (scores > last - NEAR)
        found[path].append(border | ((scores - adapter.config.threshold).abs() < NEAR))

    for path, adapter in moram.adapters(model).items():
        adapter.register_forward_pre_hook(partial(watch, path=path))
    for task in TASKS:
        for ids, mask in batches[task]:
            model(input_ids=ids, attention_mask=mask)
    return {
        path: torch.cat(rows).view(len(TASKS), -1, rows[0].shape[1]).double().mean(1)
        for path, rows in found.items()
    }


def inspected(run):
    return json.loads((run / "inspect" / "inspect.json").read_text())


def test_the_files_hold_what_the_library_finds_without_batches(run, capsys):
    before = (run / "results.json").read_bytes()
    assert main(["inspect", str(run)]) == 0
    found, printed = inspected(run), capsys.readouterr().out
    batches = {task: answered(run, task) for task in TASKS}
    report = inspect_atoms(loaded(run), batches, TASKS)
    unsure = unclear(loaded(run), batches)
    assert found["inputs"] == found["tasks"] == list(TASKS)
    assert found["tokens"] == [16 * 11] * 3 == list(report.num_tokens)
    assert list(found["adapters"]) == list(report.paths)
    for path, details in found["adapters"].items():
        for name in ("weights", "fired"):
            off = torch.tensor(details[name], dtype=torch.float64) - getattr(report, name)[path]
            assert (off.abs() <= 1e-3 + unsure[path]).all(), (path, name)
        different = set(details["dead"]) ^ set(report.dead(path))
        assert different <= set(unsure[path].any(0).nonzero().flatten().tolist())
        assert details["owners"] == [0] * 4 + [1] * 4 + [2] * 4
    share = torch.tensor(found["share"])
    torch.testing.assert_close(share, report.share().float(), rtol=0, atol=0.05)
    # Reuse by hand from the shares: what lies left of the diagonal.
    left = [sum(row[:i]) for i, row in enumerate(found["share"])]
    assert found["reuse"] == pytest.approx(left, abs=0.03)
    assert [count["atoms"] for count in found["dead_atoms"]] == [4 * 8] * 3
    for i, task in enumerate(TASKS):
        reuse = f"{found['reuse'][i]:.1f} ({('', '33.3', '66.7')[i]})" if i else "-"
        cells = [f"{value:.1f}" for value in found["share"][i]]
        fired = f"{found['fired_per_token'][i]:.2f}"
        assert f"| {task} | {' | '.join(cells)} | {reuse} | {fired} |" in printed
    assert (run / "inspect" / "inspect.md").read_text().strip() in printed
    assert (run / "inspect" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "results.json").read_bytes() == before


def test_a_run_that_generates_is_looked_at_without_its_answers(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"decoding": "generate"}))
    assert main(["inspect", str(run), "--limit", "3", "--tasks", "sizes,letters"]) == 0
    found = inspected(run)
    # "siz 0x2:" and "let 0x0:" have eight bytes each.
    assert found["inputs"] == ["sizes", "letters"] and found["tokens"] == [24, 24]


def test_last_looks_at_the_final_tokens_of_each_example(run, tmp_path):
    out = tmp_path / "elsewhere"
    assert main(["inspect", str(run), "--limit", "5", "--last", "2", "--out", str(out)]) == 0
    assert json.loads((out / "inspect.json").read_text())["tokens"] == [10, 10, 10]
    assert "last 2 tokens" in (out / "inspect.md").read_text()
    assert not (run / "inspect").exists()


def test_data_and_split_may_be_other_ones(run, tmp_path):
    write_data(tmp_path / "other", TASKS, examples=4)
    arguments = ["--data", str(tmp_path / "other"), "--split", "eval"]
    assert main(["inspect", str(run), *arguments]) == 0
    assert inspected(run)["tokens"] == [4 * 11] * 3


def read_atoms(cell):
    """What a cell of the printed table says: task, index and weight of each atom."""
    found = [] if cell == "none fired" else [atom.split(" ") for atom in cell.split(", ")]
    assert all(index.startswith("#") and len(w.split(".")[1]) == 2 for _, index, w in found)
    return [(task, int(index[1:]), float(weight)) for task, index, weight in found]


def test_a_text_shows_the_strongest_atoms_of_the_chosen_adapter(run, capsys):
    arguments = ["--limit", "2", "--text", "col|", "--adapter", QUERY]
    assert main(["inspect", str(run), *arguments]) == 0
    printed, found = capsys.readouterr().out, inspected(run)
    ids = torch.tensor(make_tokenizer()("col|").input_ids)
    view = token_atoms(loaded(run), ids, QUERY, TASKS)
    assert found["adapter"] == QUERY
    assert [row["token"] for row in found["text"]] == list("col|")
    for row, atoms in zip(found["text"], view, strict=True):
        token = "\\|" if row["token"] == "|" else row["token"]
        (cell,) = re.findall(rf"^\| `'{re.escape(token)}'` \| (.*) \|$", printed, re.MULTILINE)
        # Half of the last decimal that is printed, besides what the file's numbers may differ by.
        for shown, close in ((row["atoms"], 1e-4), (read_atoms(cell), 0.005 + 1e-4)):
            assert [(task, index) for task, index, _ in shown] == [a[:2] for a in atoms]
            assert [w for *_, w in shown] == pytest.approx([a.weight for a in atoms], abs=close)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "letter"], "tasks must be among letters, colours, sizes, got 'letter'"),
        (["--tasks", "letter"], "did you mean letters?"),
        (["--tasks", ","], "tasks must be one or more different names, got []"),
        (["--adapter", "layers.0.self_attn.q_proj"], f"closest: {QUERY}"),
        (["--data", "/nowhere"], "/nowhere has no task 'letters'"),
        (["--limit", "0"], "limit must be >= 1, got 0"),
        (["--last", "0"], "last must be >= 1, got 0"),
        (["--text", " "], "text must hold at least one token, got ' '"),
        (["--text", "a\udcff"], "text must hold whole characters, got '\\udcff' in place 1"),
    ],
)
def test_a_bad_argument_is_one_clear_line(run, capsys, arguments, message):
    assert main(["inspect", str(run), *arguments]) == 1
    error = capsys.readouterr().err
    # The library may draw a bar while it reads the model.
    assert error.splitlines()[-1].startswith("moram inspect: ") and message in error
    assert not (run / "inspect").exists()


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path} is no run of moram trace or moram xtail: it holds no config.json" in (
        capsys.readouterr().err
    )


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_of_another_method_is_one_clear_line(run, capsys):
    change(run / "config.json", method="lora")
    assert main(["inspect", str(run)]) == 1
    assert "has no atoms: its method is lora, not moram" in capsys.readouterr().err


def test_an_unfinished_run_is_one_clear_line(run, capsys):
    change(run / "results.json", complete=False)
    assert main(["inspect", str(run)]) == 1
    assert f"{run} is not finished" in capsys.readouterr().err
    (run / "results.json").unlink()
    assert main(["inspect", str(run)]) == 1
    assert f"{run} is not finished" in capsys.readouterr().err


def test_a_run_without_its_adapters_is_one_clear_line(run, capsys):
    shutil.rmtree(run / "adapters")
    assert main(["inspect", str(run)]) == 1
    assert f"{run} has no MoRAM adapters" in capsys.readouterr().err
