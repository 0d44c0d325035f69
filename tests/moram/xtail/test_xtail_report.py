"""Tables of `moram xtail`: summaries by hand, runs beside published rows, presets as published."""

import copy
import csv
import json

import pytest
from PIL import Image
from xtail_support import TAKEN

from moram.cli import main
from moram.xtail.report import REPORT, per_dataset
from moram.xtail.settings import make_settings

# The order of the publication, written out.
TEN = ("aircraft", "caltech101", "dtd", "eurosat", "oxford_flowers", "food101", "mnist")
TEN += ("oxford_pets", "stanford_cars", "sun397")
# Row t: after dataset t.
MATRIX = [[80.0, 10.0, 20.0], [96.0, 60.0, 25.0], [68.0, 72.0, 85.0]]
BY_HAND = {
    "transfer": 16.25,  # (10 + (20 + 25) / 2) / 2
    "average": 516 / 9,  # 110 + 181 + 225, of nine cells
    "last": 75.0,  # (68 + 72 + 85) / 3
    "forgetting": 14.0,  # (96 - 68 + 72 - 72) / 2
}
CLASSES = {"a": 4, "b": 3, "c": 2}
TITLES = ["method", "runs", "Transfer", "Average", "Last", "Forgetting"]
TITLES += ["trained / task", "stored MiB", "seconds / task", "peak MiB"]
COSTS = ["1,000", "5.00", "17", "100"]


def results(matrix=MATRIX, tasks="abc", name="one", **changes):
    """What results.json of a finished run holds, with made-up numbers."""
    cost = {"seconds": 10.0, "peak_mib": 100.0, "trained": 1000, "stored_bytes": 3 * 2**20}
    more = {"seconds": 31.0, "peak_mib": 90.0, "trained": 900, "stored_bytes": 5 * 2**20}
    settings = make_settings("paper", changes=[{"datasets": tuple(tasks), "seed": 0}]).to_dict()
    found = {
        "format": REPORT.format,
        "complete": True,
        "method": "moram",
        "name": name,
        "tasks": list(tasks),
        "stages": [[task] for task in tasks],
        "matrix": matrix,
        "untrained": [1.0] * len(tasks),
        "classes": [CLASSES.get(task, 1) for task in tasks],
        "test_images": [10 * CLASSES.get(task, 1) for task in tasks],
        "costs": [cost, cost, more],
        "settings": settings,
    }
    found = copy.deepcopy(found | changes)
    found["summary"] = REPORT.summarise(found)
    return found


def changed(own, **changes):
    return own | {"settings": own["settings"] | changes}


def published(**changes):
    """A run over the ten datasets whose every score is 50."""
    return results([[50.0] * 10] * 10, **({"tasks": TEN} | changes))


def test_summary_of_a_matrix_worked_out_by_hand():
    assert results()["summary"] == pytest.approx(BY_HAND)


def test_per_dataset_scores_worked_out_by_hand():
    found = per_dataset(MATRIX)
    assert found["Transfer"] == [None, 10.0, 22.5]
    assert found["Average"] == pytest.approx([244 / 3, 142 / 3, 130 / 3])
    assert found["Last"] == [68.0, 72.0, 85.0]


def test_zero_shot_has_the_same_row_each_time_and_forgets_nothing():
    found = results([[10.0, 20.0, 60.0]], stages=[[]], method="zero-shot")
    expected = {"transfer": 40.0, "average": 30.0, "last": 30.0, "forgetting": 0.0}
    assert found["summary"] == pytest.approx(expected)
    _, rows = REPORT.dataset_table([found])
    assert rows == [
        ["one", "Transfer", "-", "20.0", "60.0"],
        ["one", "Average", "10.0", "20.0", "60.0"],
        ["one", "Last", "10.0", "20.0", "60.0"],
    ]


def test_notes_name_the_runs_that_were_told_the_dataset():
    runs = [results(), results(name="asks", needs_task_id=True), results(needs_task_id=False)]
    plain = "Accuracies in percent among all 9 classes, without a hint of the dataset"
    assert REPORT.notes([runs[0], runs[2]]) == f"{plain}."
    assert REPORT.notes(runs) == f"{plain}; asks was told it."


def test_joint_training_has_last_alone():
    found = results([[10.0, 20.0, 60.0]], stages=[["a", "b", "c"]], method="joint")
    assert found["summary"] == {"last": 30.0}
    _, rows = REPORT.table([found])
    assert rows == [["one", "1", "-", "-", "30.0", "-", *COSTS]]
    assert REPORT.dataset_table([found])[1] == [["one", "Last", "10.0", "20.0", "60.0"]]


def test_an_unfinished_matrix_has_no_summary():
    assert results(MATRIX[:2])["summary"] == {}
    assert results([], stages=[[]])["summary"] == {}


def test_table_of_one_run():
    titles, rows = REPORT.table([results()])
    assert titles == TITLES
    assert rows == [["one", "1", "16.2", "57.3", "75.0", "14.0", *COSTS]]
    titles, rows = REPORT.dataset_table([results()])
    assert titles == ["method", "metric", "a", "b", "c"]
    assert rows[0] == ["one", "Transfer", "-", "10.0", "22.5"]
    assert rows[2] == ["one", "Last", "68.0", "72.0", "85.0"]


OTHER = [[40.0, 30.0, 10.0], [50.0, 20.0, 15.0], [44.0, 26.0, 35.0]]


def test_runs_of_other_seeds_are_one_row_with_mean_and_deviation():
    runs = [results(), changed(results(OTHER), seed=1, out="elsewhere", threads=4)]
    _, rows = REPORT.table(runs)
    # Transfer 16.25 and (30 + 12.5) / 2, Average 57.33 and 30, Last 75 and 35, Forgetting 14 and
    # (50 - 44 + 26 - 26) / 2; two values lie |x - y| / sqrt(2) apart.
    expected = ["18.8 ± 3.5", "43.7 ± 19.3", "55.0 ± 28.3", "8.5 ± 7.8"]
    assert rows == [["one", "2", *expected, *COSTS]]
    _, rows = REPORT.dataset_table(runs)
    # b: 10 and 30 before it is learned.
    assert rows[0] == ["one", "Transfer", "-", "20.0 ± 14.1", "17.5 ± 7.1"]


def test_runs_in_other_orders_are_one_row_and_columns_are_datasets():
    other = changed(results(OTHER, "cab"), seed=1, datasets=["c", "a", "b"])
    runs = [results(), other]
    _, rows = REPORT.table(runs)
    assert [row[:2] for row in rows] == [["one", "2"]]
    _, rows = REPORT.dataset_table(runs)
    # In the other order, a is the second column, b the third, and c has no transfer.
    assert rows[0] == ["one", "Transfer", "30.0", "11.2 ± 1.8", "22.5"]
    assert rows[2] == ["one", "Last", "47.0 ± 29.7", "53.5 ± 26.2", "64.5 ± 29.0"]


@pytest.mark.parametrize("key", ["cache_gib", "workers", "data_dir"])
def test_where_a_run_ran_makes_no_row_of_its_own(key):
    other = {"cache_gib": 2.0, "workers": 3, "data_dir": "/elsewhere"}
    runs = [results(), changed(results(), seed=1, **{key: other[key]})]
    assert [row[:2] for row in REPORT.table(runs)[1]] == [["one", "2"]]


def test_runs_of_one_method_with_other_settings_are_not_averaged():
    runs = [results(), changed(results(), lr=0.2), changed(results(), lr=0.2, seed=5)]
    _, rows = REPORT.table(runs)
    assert [row[:2] for row in rows] == [["one (lr 0.0005)", "1"], ["one (lr 0.2)", "2"]]


def test_two_runs_that_differ_in_nothing_are_refused():
    with pytest.raises(ValueError, match="two runs of one have the same order and seed"):
        REPORT.table([results(), results()])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (results(tasks="abd", name="two"), "runs must share their tasks"),
        (results(name="two", classes=[4, 3, 3]), "runs must share their classes"),
        (results(name="two", test_images=[1, 2, 3]), "runs must share their test_images"),
        (changed(results(name="two"), backbone="RN50"), "got backbone 'ViT-B-16' and 'RN50'"),
        (changed(results(name="two"), pretrained="x"), "got pretrained 'auto' and 'x'"),
        (changed(results(name="two"), shots=4), "got shots 16 and 4"),
    ],
    ids=["tasks", "classes", "test-images", "backbone", "pretrained", "shots"],
)
def test_runs_that_were_not_made_alike_are_refused(other, message):
    for function in (REPORT.table, REPORT.dataset_table):
        with pytest.raises(ValueError, match=message):
            function([results(), other])


# Of the MoRAM page, and Forgetting of CoDyRA's page.
PUBLISHED = {
    "moram": ["MoRAM (published)", "", "63.3", "72.7", "80.9", "-"],
    "codyra": ["CoDyRA (published)", "", "63.2", "71.3", "79.2", "1.9"],
    "lora": ["LoRA (published)", "", "61.8", "60.5", "59.4", "14.9"],
    "moe-adapters": ["MoE-Adapter (published)", "", "56.0", "63.0", "70.5", "5.4"],
    "rail-primal": ["RAIL-Primal (published)", "", "62.4", "70.7", "79.1", "-"],
    "zero-shot": ["Zero-shot (published)", "", "62.4", "-", "-", "-"],
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_rows_stand_beside_the_methods_that_have_one(method):
    _, rows = REPORT.table([published(method=method)])
    assert rows[0][:6] == ["one", "1", "50.0", "50.0", "50.0", "0.0"]
    assert rows[1] == [*PUBLISHED[method], "", "", "", ""]
    assert len(rows) == 2


@pytest.mark.parametrize("method", sorted(set(TAKEN) - set(PUBLISHED) - {"joint"}))
def test_methods_without_a_published_row_have_none(method):
    assert len(REPORT.table([published(method=method)])[1]) == 1
    assert len(REPORT.dataset_table([published(method=method)])[1]) == 3


@pytest.mark.parametrize(
    "tasks", [TEN[::-1], TEN[:9], (TEN[1], TEN[0], *TEN[2:])], ids=["reversed", "nine", "swapped"]
)
def test_published_rows_are_of_the_published_order_alone(tasks):
    runs = [results([[50.0] * len(tasks)] * len(tasks), tasks)]
    assert [row[0] for row in REPORT.table(runs)[1]] == ["one"]
    assert {row[0] for row in REPORT.dataset_table(runs)[1]} == {"one"}


def test_published_scores_of_each_dataset_stand_beside():
    _, rows = REPORT.dataset_table([published()])
    assert [row[:2] for row in rows[3:]] == [
        ["MoRAM (published)", metric] for metric in ("Transfer", "Average", "Last")
    ]
    numbers = ["74.5", "38.1", "46.9", "65.3", "82.9", "45.8", "88.2", "65.1", "62.9"]
    assert rows[3][2:] == ["-", *numbers]
    last = ["37.7", "81.5", "70.7", "92.4", "95.0", "86.0", "97.6", "92.6", "81.0", "74.7"]
    assert rows[5][2:] == last


@pytest.mark.parametrize(
    ("method", "name", "first", "last"),
    [("zero-shot", "Zero-shot", "23.5", "63.7"), ("joint", "each dataset alone", "39.6", "74.7")],
    ids=["zero-shot", "joint"],
)
def test_bounds_of_the_publication_stand_beside(method, name, first, last):
    row = REPORT.dataset_table([published(method=method)])[1][-1]
    assert row[:3] == [f"{name} (published)", "Last", first] and row[-1] == last


@pytest.mark.parametrize(
    "setting",
    [
        {"backbone": "ViT-B-32"},
        {"pretrained": "laion400m_e32"},
        {"shots": 5},
        {"eval_limit": 100},
        {"held_out": True},
        {"spaces": True},
    ],
    ids=str,
)
def test_runs_of_another_protocol_have_no_published_row(setting):
    runs = [changed(published(), **setting)]
    assert len(REPORT.table(runs)[1]) == 1 and len(REPORT.dataset_table(runs)[1]) == 3


def test_a_name_may_hold_what_latex_and_markdown_take_for_their_own(tmp_path):
    REPORT.write([results(name="a_b | 50%")], tmp_path)
    assert r"| a_b \| 50% | 1 |" in (tmp_path / "table.md").read_text()
    assert r"a\_b | 50\% & 1 &" in (tmp_path / "table.tex").read_text()


def cells_of_markdown(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if set("".join(row)) != {"-"}]


def cells_of_latex(text):
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    back = [line.replace(r"$\pm$", "±").replace(r"\_", "_") for line in lines]
    return [[cell.strip() for cell in line.split(" & ")] for line in back]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tasks", ["abc", TEN], ids=["three", "ten"])
def test_csv_markdown_and_latex_hold_the_same_cells(tmp_path, count, tasks):
    size = len(tasks)
    matrix = [[float((7 * t + 3 * i) % 100) for i in range(size)] for t in range(size)]
    runs = [changed(results(matrix, tasks), seed=seed) for seed in range(count)]
    REPORT.write(runs, tmp_path)
    titles, rows = REPORT.table(runs)
    each, each_rows = REPORT.dataset_table(runs)
    expected = [titles, *rows, each, *each_rows]
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        sheet = [row for row in csv.reader(file) if any(row)]
    widths = [len(titles)] * (1 + len(rows)) + [len(each)] * (1 + len(each_rows))
    assert [row[:width] for row, width in zip(sheet, widths, strict=True)] == expected
    assert all(not "".join(row[width:]) for row, width in zip(sheet, widths, strict=True))
    found = cells_of_markdown((tmp_path / "table.md").read_text(encoding="utf-8"))
    assert found[: len(expected)] == expected
    assert cells_of_latex((tmp_path / "table.tex").read_text(encoding="utf-8")) == expected
    # R itself, where there is one run.
    shown = [["", *tasks]] if count == 1 else []
    shown += [
        [f"after {task}", *(f"{score:.1f}" for score in row)]
        for task, row in zip(tasks, matrix, strict=True)
    ] * (count == 1)
    assert found[len(expected) :] == shown
    with Image.open(tmp_path / "matrix.png") as image:
        image.load()
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10


def write_results(folder, content):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


def test_the_command_writes_one_table_of_several_runs(tmp_path, capsys):
    folders = [
        write_results(tmp_path / str(seed), changed(results(), seed=seed)) for seed in (0, 1)
    ]
    assert main(["table", *folders, "--out", str(tmp_path / "both")]) == 0
    assert "| one | 2 | 16.2 ± 0.0 | 57.3 ± 0.0 |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "matrix.png",
        "table.csv",
        "table.md",
        "table.tex",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "the run is not complete"),
        ({"format": 2}, "was not written by moram trace or moram xtail"),
        ({"format": 1}, "one table holds runs of moram trace or of moram xtail, not both"),
    ],
    ids=["unfinished", "foreign", "mixed"],
)
def test_the_command_refuses_results_that_do_not_fit(tmp_path, capsys, changes, message):
    folders = [
        write_results(tmp_path / "one", results()),
        write_results(tmp_path / "two", results(name="two") | changes),
    ]
    assert main(["table", *folders, "--out", str(tmp_path / "tables")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moram table: ") and line.endswith(message)
    assert not (tmp_path / "tables").exists()
