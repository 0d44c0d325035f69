"""What `make results` writes: from the files that are there, and what the pages hold now."""

import csv
import json
import re
from statistics import mean

import pytest
import results_page
import results_tables as tables

from moram.methods.registry import METHODS


def run(name, matrix, lr=1e-3, seed=0, **changes):
    """A finished run over two tasks, as runs.json holds it; OP and BWT by hand."""
    earlier = matrix[-1][0] - matrix[0][0]
    summary = {"overall_performance": sum(matrix[-1]) / 2, "backward_transfer": earlier}
    found = {
        "name": name,
        "tasks": ["a", "b"],
        "stages": [["a"], ["b"]],
        "matrix": matrix,
        "majority": [50.0, 20.0],
        "needs_task_id": False,
        "costs": [{"seconds": 3.0, "peak_mib": 9.0, "trained": 1200, "stored_bytes": 2**20}] * 2,
        "settings": {
            **{"model": "tiny", "rank": 2, "epochs": 1, "batch_size": 4, "train_limit": 8},
            **{"lr": lr, "seed": seed},
        },
        "versions": {"torch": "2.0.0+cpu"},
        "summary": summary,
    }
    return found | changes


def write(root, name, content):
    path = root / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_pages_hold_what_make_results_writes():
    pages = results_page.pages()
    assert len(pages) > 3
    stale = [
        str(path.relative_to(results_page.ROOT))
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run make results: {', '.join(stale)}"


def test_a_row_is_the_mean_over_its_runs_and_the_best_comes_first():
    low = run("LoRA", [[80.0, 0.0], [20.0, 60.0]])
    one, two = (
        run("new", [[80.0, 0.0], [70.0, 60.0]]),
        run("new", [[80.0, 0.0], [76.0, 74.0]], seed=1),
    )
    # OP 65 and 75: mean 70, deviation sqrt(50); BWT -10 and -4: mean -7, deviation sqrt(18).
    assert tables.summary_tables([low, one, two]).splitlines() == [
        "| method | runs | OP | just learned | BWT | lr | stored MiB | trained | s / stage |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| new | 2 | 70.0±7.1 | - | -7.0±4.2 | 1e-3 | 1.0 | 1,200 | 3 |",
        "| LoRA | 1 | 40.0 | - | -60.0 | 1e-3 | 1.0 | 1,200 | 3 |",
        "| majority class |  | 35.0 |  |  |  |  |  |  |",
    ]
    assert tables.task_tables([low, one, two]).splitlines()[2:] == [
        "| new | 73±4 | 67±10 |",
        "| LoRA | 20 | 60 |",
        "| majority class | 50 | 20 |",
    ]


def test_runs_in_another_order_of_tasks_count_for_their_tasks():
    other = run("new", [[74.0, 0.0], [74.0, 76.0]], tasks=["b", "a"])
    table = tables.task_tables([run("new", [[80.0, 0.0], [76.0, 74.0]]), other])
    assert table.splitlines()[2] == "| new | 76 | 74 |"


def test_a_row_says_what_only_its_method_was_given():
    rows = [
        run("LoRA per task", [[80.0, 0.0], [80.0, 60.0]], needs_task_id=True),
        run("joint", [[30.0, 20.0]], stages=[["a", "b"]]),
        run("MoRAM, protected", [[1.0, 0.0], [1.0, 0.0]]),
        run("MoRAM, aligned", [[0.9, 0.0], [0.9, 0.0]]),
        run("MoRAM, zero-shot first", [[0.8, 0.0], [0.8, 0.0]]),
        run("zero-shot", [[0.0, 0.0]], stages=[[]]),
    ]
    assert list(tables.groups(rows)) == [
        *("LoRA per task (told the task)", "joint (all at once)", "MoRAM, protected [+]"),
        *("MoRAM, aligned [+]", "MoRAM, zero-shot first [+]", "zero-shot"),
    ]


def test_what_is_wider_than_a_page_becomes_several_tables():
    columns = [[f"column {i:02}" + "x" * 20, "1", "2"] for i in range(9)]
    found = tables.fit(["method", "one", "other"], [columns])
    assert max(map(len, found.splitlines())) <= 100
    for i in range(9):
        assert f"column {i:02}" in found
    # Three columns of 29 letters fit beside the methods.
    assert found.count("| method |") == 5 == found.count("| one | ")


def test_rates_of_a_search_are_columns():
    runs = [
        run("new, lr 0.001", [[0.0, 0.0], [10.0, 20.0]]),
        run("new", [[0, 0], [30, 20]], 2.5e-4),
    ]
    assert tables.search_table(runs).splitlines() == [
        *("| method | 2.5e-4 | 1e-3 |", "| --- | --- | --- |", "| new | 25.0 | 15.0 |"),
    ]


def test_a_search_over_steps_names_them_and_joint_training_has_a_last_score_alone(tmp_path):
    scores = {"transfer": 30.0, "average": 40.0, "last": 50.0}
    settings = {"shots": 16, "batch_size": 20, "rank": 16, "seed": 100, "backbone": "small"}
    runs = [
        run(name, [[1.0, 2.0]] * 2, summary=own, settings=settings | {"lr": lr, "iterations": n})
        for name, own, lr, n in (
            ("LoRA, 260 steps, lr 0.001", scores, 1e-3, 260),
            ("LoRA, 500 steps, lr 0.0005", scores | {"last": 51.0}, 5e-4, 500),
            ("joint, 500 steps, lr 0.001", {"last": 60.0}, 1e-3, 500),
        )
    ]
    write(tmp_path, "images/steps/runs.json", runs)
    found = results_page.pages(tmp_path)[tmp_path / "benchmarks/results/images/README.md"]
    assert "260 or 500 steps, batches of 20" in found
    assert "| LoRA, 260 steps | - | 30.0/40.0/50.0 |" in found
    assert "| LoRA, 500 steps | 30.0/40.0/51.0 | - |" in found
    assert "| joint, 500 steps | - | -/-/60.0 |" in found


def test_what_a_ridge_finds_is_a_row_a_run(tmp_path):
    path = tmp_path / "benchmarks" / "results" / "images" / "probe.csv"
    path.parent.mkdir(parents=True)
    path.write_text(
        "name,method,seed,last,probe,probe a,probe b,text,text a,text b,s_texts,ms_image\n"
        "LoRA,lora,0,30.0,50.0,40.0,60.0,30.0,20.0,40.0,0.100,1.500\n"
        "MoE-Adapters,moe-adapters,0,31.0,,,,,,,0.200,2.500\n"
    )
    found = results_page.pages(tmp_path)[path.parent / "README.md"]
    assert found.splitlines()[-4:] == [
        "| method | Last | ridge | a | b | ms / image |",
        "| --- | --- | --- | --- | --- | --- |",
        "| LoRA | 30.0 | 50.0 | 40.0 | 60.0 | 1.500 |",
        "| MoE-Adapters | 31.0 | - | - | - | 2.500 |",
    ]


def test_parts_that_are_missing_are_left_out_and_new_ones_appear(tmp_path):
    write(tmp_path, "language/textcls/runs.json", [run("LoRA", [[80.0, 0.0], [20.0, 60.0]])])
    before = results_page.pages(tmp_path)
    write(tmp_path, "language/strange/runs.json", [run("new", [[80.0, 0.0], [20.0, 60.0]])])
    after = results_page.pages(tmp_path)
    assert {str(path.relative_to(tmp_path / "benchmarks")) for path in after} == {
        *("results/README.md", "results/language/README.md", "results/images/README.md"),
    }
    for name in ("results/README.md", "results/language/README.md"):
        path = tmp_path / "benchmarks" / name
        assert re.findall("## (.*)", before[path]) == ["Four classification tasks"]
        titles = ["Four classification tasks", "language/strange"]
        assert re.findall("## (.*)", after[path]) == titles


def test_epochs_that_differ_by_task_are_said(tmp_path):
    found = run("LoRA", [[80.0, 0.0], [20.0, 60.0]])
    found["settings"]["epochs"] = {"*": 1, "b": 2}
    write(tmp_path, "language/textcls/runs.json", [found])
    page = tmp_path / "benchmarks" / "results" / "README.md"
    assert (
        "rank or atoms 2 a task, 1 epoch, 2 for b, batches of 4"
        in results_page.pages(tmp_path)[page]
    )


def test_only_what_lies_between_the_comments_is_written(tmp_path):
    write(tmp_path, "language/textcls/runs.json", [run("LoRA", [[80.0, 0.0], [20.0, 60.0]])])
    page = tmp_path / "README.md"
    page.write_text("one\n<!-- begin results -->\nold\n<!-- end results -->\ntwo\n")
    text = results_page.pages(tmp_path)[page]
    assert text.startswith("one\n<!-- begin results -->\n\n| method |")
    assert text.endswith("\n\n<!-- end results -->\ntwo\n")
    assert "old" not in text


def test_the_front_page_shows_six_rows_and_no_good_baseline_is_left_out():
    rows = results_page.front_table(results_page.ROOT).split("\n\n")[0].splitlines()[2:]
    names = [row.split(" | ")[0].strip("| ") for row in rows]
    assert len(names) == 6
    runs = tables.read(results_page.ROOT / f"benchmarks/results/{results_page.FRONT}/runs.json")
    ranked = [
        name for name in tables.groups(runs) if name.removesuffix(" [+]") not in results_page.SHOWN
    ]
    assert set(ranked[:3]) <= set(names)


def test_what_the_front_page_says_beside_its_table_holds():
    folder = results_page.ROOT / "benchmarks" / "results"
    rows = tables.groups(tables.read(folder / results_page.FRONT / "runs.json"))
    change = {
        name: mean(run["summary"]["backward_transfer"] for run in group)
        for name, group in rows.items()
        if name in ("MoRAM", "MoRAM, protected [+]")
    }
    # "The published rule forgets", and protected keys "next to nothing": within the noise of a row.
    assert change["MoRAM"] < -5 < -3 < change["MoRAM, protected [+]"]
    images = tables.read(folder / "images" / "small" / "runs.json")
    last = {name: mean(map(tables.final, group)) for name, group in tables.groups(images).items()}
    frozen = [score for name, score in last.items() if name.startswith(("RAIL", "LADA"))]
    # "Far above every adapter that learns in sequence; one that learns all at once ends as high".
    (joint,) = (score for name, score in last.items() if "all at once" in name)
    others = [score for score in last.values() if score not in (*frozen, joint)]
    assert joint > min(frozen) > 10 + max(others)


def test_every_method_is_in_the_table_of_methods():
    block = results_page.methods_block(results_page.ROOT)
    assert re.findall(r"^\| `(\w\S*)` \|", block, re.MULTILINE) == list(METHODS)
    assert re.findall(r"^- `(\S+)`: ", block, re.MULTILINE) == list(METHODS)
    told = [line.split("`")[1] for line in block.splitlines() if "` | yes |" in line]
    assert told == ["task-lora", "in-context"]
    assert "  Stores one LoRA and twice as much beside it (F and theta*)." in block


def test_speed_is_what_the_csv_says():
    folder = results_page.ROOT / "benchmarks" / "results"
    with (folder / "throughput.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "torch"]
    table = tables.speed_table(tables.read(folder / "throughput.csv"))
    (wide,) = (line for line in table.splitlines() if line.startswith("| 2048 | 1024 | training |"))
    expected = [
        float(row["ratio_to_plain"])
        for row in sorted(rows, key=lambda row: int(row["atoms"]))
        if (row["D"], row["tokens"], row["mode"]) == ("2048", "1024", "training")
    ]
    assert [float(cell) for cell in wide.split("|")[4:-1]] == pytest.approx(expected, rel=5e-3)


def test_layers_that_hold_many_tasks_stand_side_by_side():
    base = {"tasks": "8", "tokens": "1", "layer": "base", "us_per_token": "50", "bytes": "0"}
    bank = base | {"layer": "moram", "us_per_token": "75", "bytes": str(3 * 2**19)}
    rows = [base | {"ratio_to_base": "1"}, bank | {"ratio_to_base": "1.5"}]
    assert tables.many_tasks_table(rows).splitlines() == [
        "| tasks | tokens | base | moram |",
        "| --- | --- | --- | --- |",
        "| 8 | 1 | 50 (1) | 75 (1.5), 1.5 MiB |",
    ]


def test_times_beside_lora_stand_by_mode_and_atoms():
    row = {"mode": "decode", "atoms": "64", "ratio": "1.186", "ratio_p20": "1.1"}
    rows = [row | {"ratio_p80": "1.25"}, row | {"mode": "prefill", "atoms": "8", "ratio_p80": "2"}]
    assert tables.lora_table(rows).splitlines() == [
        "| LoRA of rank 8 = 1 | 8 atoms | 64 atoms |",
        "| --- | --- | --- |",
        "| decode | - | 1.19 (1.10 to 1.25) |",
        "| prefill | 1.19 (1.10 to 2.00) | - |",
    ]


def test_the_check_names_pages_that_are_out_of_date(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    stale = {tmp_path / "README.md": "new\n"}
    (tmp_path / "README.md").write_text("old\n")
    monkeypatch.setattr(results_page, "pages", lambda: stale)
    assert results_page.main(["--check"]) == 1
    assert capsys.readouterr().err == "README.md is out of date: run make results\n"
    assert (tmp_path / "README.md").read_text() == "old\n"
    assert results_page.main([]) == 0
    assert (tmp_path / "README.md").read_text() == "new\n"
    assert results_page.main(["--check"]) == 0
