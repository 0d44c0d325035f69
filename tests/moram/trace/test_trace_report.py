"""Tables of `moram trace`: summaries by hand, several runs in one table, files that parse back."""

import copy
import csv
import json
import re

import pytest
from PIL import Image
from trace_support import settings_for, write_data, write_model

from moram.continual import Example
from moram.continual.data import Task
from moram.continual.scorers import scorer_for
from moram.harness.tables import latex, markdown, matrix_lines, spread
from moram.trace.report import REPORT, majority_row
from moram.trace.run import run_trace

# Row t: after task t. Task 0 gets worse, task 1 better, task 2 is last.
MATRIX = [[80.0, 10.0, 20.0], [96.0, 60.0, 25.0], [68.0, 72.0, 85.0]]
BY_HAND = {
    "overall_performance": 75.0,  # (68 + 72 + 85) / 3
    "plasticity": 75.0,  # (80 + 60 + 85) / 3
    "backward_transfer": 0.0,  # (-12 + 12) / 2
    "trace_backward_transfer": 0.0,  # (-12 + 12 + 0) / 3
    "trace_forgetting": 4.0,  # 12 / 3
    "forgetting": 14.0,  # (96 - 68 + 72 - 72) / 2
}
TITLES = ["method", "runs", "a", "b", "c", "OP", "just learned", "BWT (unclipped, T-1)"]
TITLES += ["BWT (unclipped, T)", "BWT (TRACE: clipped, T, sign flipped)", "forgetting (from best)"]
TITLES += ["trained / stage", "stored MiB", "seconds / stage", "peak MiB", "task id"]


def results(matrix=MATRIX, tasks="abc", name="one", **changes):
    """What results.json of a finished run holds, with made-up numbers."""
    cost = {"seconds": 10.0, "peak_mib": 100.0, "trained": 1000, "stored_bytes": 3 * 2**20}
    more = {"seconds": 31.0, "peak_mib": 90.0, "trained": 900, "stored_bytes": 5 * 2**20}
    found = {
        "format": 1,
        "complete": True,
        "name": name,
        "tasks": list(tasks),
        "stages": [[task] for task in tasks],
        "matrix": matrix,
        "untrained": [{"a": 1.0, "b": 2.0, "c": 3.0}[task] for task in tasks],
        "majority": [{"a": 33.3, "b": 50.0, "c": 20.0}[task] for task in tasks],
        "metrics": [f"metric of {task}" for task in tasks],
        "decoding": ["generate"] * len(tasks),
        "needs_task_id": False,
        "costs": [cost, cost, more],
        "settings": {"seed": 0, "order": None, "tasks": list(tasks), "lr": 0.1, "method_args": {}},
    }
    found = copy.deepcopy(found | changes)
    found["summary"] = REPORT.summarise(found)
    return found


def changed(own, **changes):
    return own | {"settings": own["settings"] | changes}


def row_of(rows, name):
    (row,) = (row for row in rows if row[0] == name)
    return row


def test_summary_of_a_matrix_worked_out_by_hand():
    assert results()["summary"] == pytest.approx(BY_HAND)
    unlearned = [[80.0, None, None], [96.0, 60.0, None], [68.0, 72.0, 85.0]]
    assert results(unlearned)["summary"] == pytest.approx(BY_HAND)


def test_one_stage_has_no_change_over_time():
    for stages in ([[]], [["a", "b", "c"]]):
        found = results([[10.0, 20.0, 60.0]], stages=stages)
        assert found["summary"] == {"overall_performance": 30.0}


def test_an_unfinished_matrix_has_no_summary():
    assert results(MATRIX[:2])["summary"] == {}
    assert results([], stages=[[]])["summary"] == {}


def test_majority_row_is_what_the_most_frequent_answer_scores():
    letters = Task("FOMC", (), tuple(Example("p", answer) for answer in "ABBC"))
    code = Task("Py150", (), (Example("p", "ab"), Example("p", "ab"), Example("p", "ac")))
    scorers = [scorer_for(task.name) for task in (letters, code)]
    # "B" is right twice of four; "ab" agrees with "ac" in 2 of 4 characters: (100 + 100 + 50) / 3.
    assert majority_row([letters, code], scorers) == pytest.approx([50.0, 250 / 3], abs=0.4)


def test_table_of_one_run():
    titles, rows = REPORT.table([results()])
    assert titles == TITLES
    assert rows[0] == ["majority class", "", "33.3", "50.0", "20.0", *[""] * 11]
    assert rows[1] == ["untrained", "", "1.0", "2.0", "3.0", *[""] * 11]
    numbers = ["68.0", "72.0", "85.0", "75.0", "75.0", "0.0", "0.0", "4.0", "14.0"]
    assert rows[2] == ["one", "1", *numbers, "1,000", "5.0", "17", "100", "no"]
    assert len(rows) == 3


def test_runs_of_other_seeds_and_orders_are_one_row_with_mean_and_deviation():
    other = results([[50.0, 0, 0], [40.0, 60.0, 0], [30.0, 20.0, 70.0]], "cab")
    runs = [results(), changed(other, seed=1, order=2, out="elsewhere", threads=4)]
    titles, rows = REPORT.table(runs)
    row = row_of(rows, "one")
    # a: 68 and 20, b: 72 and 70, c: 85 and 30; two values lie |x - y| / sqrt(2) apart.
    expected = {"a": "44.0 ± 33.9", "b": "71.0 ± 1.4", "c": "57.5 ± 38.9", "runs": "2"}
    # OP 75 and 40; learned 75 and 60; TRACE's BWT 4 and (20 + 40) / 3.
    expected |= {"OP": "57.5 ± 24.7", "just learned": "67.5 ± 10.6"}
    expected |= {"BWT (TRACE: clipped, T, sign flipped)": "12.0 ± 11.3"}
    for title, text in expected.items():
        assert row[titles.index(title)] == text, title
    assert len(rows) == 3


def test_methods_have_rows_of_their_own_and_single_stages_no_change_over_time():
    joint = results([[10.0, 20.0, 60.0]], name="joint", stages=[["a", "b", "c"]])
    asks = results(name="asks", needs_task_id=True)
    titles, rows = REPORT.table([results(), joint, asks])
    assert [row[0] for row in rows] == ["majority class", "untrained", "one", "joint", "asks"]
    assert row_of(rows, "joint")[2:11] == ["10.0", "20.0", "60.0", "30.0", *["-"] * 5]
    assert row_of(rows, "asks")[-1] == "yes" and row_of(rows, "one")[-1] == "no"
    assert all(len(row) == len(titles) for row in rows)


def test_runs_of_one_method_with_other_settings_are_not_averaged():
    runs = [results(), changed(results(), lr=0.2), changed(results(), lr=0.2, seed=5)]
    _, rows = REPORT.table(runs)
    assert [row[:2] for row in rows[2:]] == [["one (lr 0.1)", "1"], ["one (lr 0.2)", "2"]]
    runs = [results(), changed(results(), method_args={"top_k": 4})]
    _, rows = REPORT.table([*runs, results(name="two")])
    names = ["one (method_args.top_k -)", "one (method_args.top_k 4)", "two"]
    assert [row[0] for row in rows[2:]] == names


def test_without_a_score_of_the_untrained_model_there_is_no_such_row():
    _, rows = REPORT.table([results(untrained=None)])
    assert [row[0] for row in rows] == ["majority class", "one"]
    # One run of several is enough: the model is the same.
    _, rows = REPORT.table([results(untrained=None), results(name="two")])
    assert row_of(rows, "untrained")[2:5] == ["1.0", "2.0", "3.0"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (results(tasks="bca") | {"tasks": ["b", "c", "d"]}, "runs must share their tasks, got"),
        (results(metrics=["x", "metric of b", "metric of c"]), "got metrics metric of a and x for"),
        (results(decoding=["generate", "forced", "generate"]), "got decoding generate and forced"),
        (results(majority=[33.3, 50.0, 21.0]), "got majority 20.0 and 21.0 for c"),
    ],
)
def test_runs_that_were_not_scored_alike_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        REPORT.table([results(), other])


def test_spread_is_the_mean_and_the_sample_deviation():
    assert spread([]) == spread([None]) == "-"
    assert spread([1.25, None]) == "1.2"
    # Deviations -1, 0, 1: sqrt((1 + 0 + 1) / 2) = 1.
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_matrix_lines_leave_out_what_was_not_scored():
    own = results([[80.0, None, None], [96.0, 60.0, None], [68.0, 72.0, 85.0]])
    assert matrix_lines(own) == [
        "| | a | b | c |",
        "| --- | --- | --- | --- |",
        "| after a | 80.0 |  |  |",
        "| after b | 96.0 | 60.0 |  |",
        "| after c | 68.0 | 72.0 | 85.0 |",
    ]
    single = results([[1.0, 2.0, 3.0]], stages=[[]])
    assert matrix_lines(single)[2] == "| score | 1.0 | 2.0 | 3.0 |"


ODD = (["m_1 & 50%", "a|b"], [["x ± y", "$1{2}#~^\\"], ["", "é"]])


def test_markdown_parses_back():
    def cells(line):
        parts = re.split(r"(?<!\\)\|", line)[1:-1]
        return [part.strip().replace(r"\|", "|") for part in parts]

    lines = markdown(*ODD).splitlines()
    assert cells(lines[1]) == ["---", "---"]
    assert [cells(line) for line in (lines[0], *lines[2:])] == [ODD[0], *ODD[1]]


def test_latex_parses_back():
    text = latex(*ODD)
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    names = {r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"$\pm$": "±"}
    names |= {r"\textbackslash{}": "\\"} | {f"\\{c}": c for c in "&%_#${}"}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    found = [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in lines]
    back = [[pattern.sub(lambda m: names[m[0]], cell) for cell in row] for row in found]
    assert back == [ODD[0], *ODD[1]]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_report_holds_the_table_three_times_and_a_picture(tmp_path, count):
    runs = [changed(results(), seed=seed) for seed in range(count)]
    REPORT.write(runs, tmp_path / "new")
    titles, rows = REPORT.table(runs)
    with open(tmp_path / "new" / "table.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [titles, *rows]
    text = (tmp_path / "new" / "table.md").read_text(encoding="utf-8")
    assert text.startswith(markdown(titles, rows))
    for task in "abc":
        assert f"- {task}: metric of {task}, decoding generate" in text
    assert ("| after a | 80.0 |" in text) == (count == 1)
    assert (tmp_path / "new" / "table.tex").read_text(encoding="utf-8") == latex(titles, rows)
    # Side 1.2 + 0.62 * 3 inches and one for the names, at most three beside each other, 120 dpi.
    side, across, down = 1.2 + 0.62 * 3, min(count, 3), -(-count // 3)
    with Image.open(tmp_path / "new" / "matrix.png") as image:
        image.load()
        assert image.size == (int((side + 1) * across * 120), int(side * down * 120))
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "matrix.png",
        "table.csv",
        "table.md",
        "table.tex",
    ]


def test_results_that_are_missing_damaged_foreign_or_unfinished_are_named(tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=f"{re.escape(str(tmp_path))}.results.json{message}"):
            REPORT.read([tmp_path])

    refused(FileNotFoundError, " does not exist")
    path = tmp_path / "results.json"
    for text, message in (
        ('{"complete"', " is damaged"),
        ("[]", " was not written by moram trace"),
        ('{"complete": true}', " was not written by moram trace"),
        (json.dumps(results(complete=False)), ": the run is not complete"),
    ):
        path.write_text(text)
        refused(ValueError, message)
    path.write_text(json.dumps(results()))
    assert REPORT.read([tmp_path]) == REPORT.read([path]) == [results()]


@pytest.mark.parametrize("method", ["moram", "zero-shot", "joint"])
def test_tables_of_runs_name_the_variants_of_the_metrics(tmp_path, method):
    tasks = ("MeetingBank", "Py150", "other")
    own = (write_model(tmp_path / "model"), write_data(tmp_path / "data", tasks))
    changes = {"tasks": tasks, "rouge": "rouge_score", "untrained": True}
    changes |= {"decoding": {"other": "forced", "*": "generate"}, "truncate_right": ["Py150"]}
    found = run_trace(settings_for(*own, tmp_path / "out", method, **changes))
    text = (tmp_path / "out" / "table.md").read_text()
    notes = dict(re.findall(r"^- (\S+): (.*)$", text, re.MULTILINE))
    assert "(rouge-score" in notes["MeetingBank"] and notes["MeetingBank"].endswith("generate")
    assert "difflib" in notes["Py150"] and notes["other"].endswith("decoding forced")
    rows = 3 if method == "moram" else 1
    assert len(found["matrix"]) == rows
    # Where nothing is trained, the one row is the untrained model's.
    assert (found["untrained"] is None) == (method == "zero-shot")
    if rows == 1:
        assert found["summary"] == {
            "overall_performance": pytest.approx(sum(found["matrix"][0]) / 3)
        }
        assert "| score |" in text or "| after all |" in text
    assert REPORT.read([tmp_path / "out"]) == [found]


def test_two_runs_that_differ_in_nothing_are_refused():
    with pytest.raises(ValueError, match="two runs of one have the same order and seed"):
        REPORT.table([results(), results()])


@pytest.mark.parametrize("key", ["model", "eval_split", "eval_limit"])
def test_runs_scored_on_other_examples_or_models_are_refused(key):
    other = results(name="two")
    other["settings"] = other["settings"] | {key: "another"}
    with pytest.raises(ValueError, match=f"runs must be scored alike, got {key}"):
        REPORT.table([results(), other])
