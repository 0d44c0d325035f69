"""Results as numbers and tables: Markdown, CSV, LaTeX. The picture is drawn by `plot`."""

from collections import Counter
from pathlib import Path
from statistics import mean

from ..continual import metrics
from ..harness import tables
from ..harness.compare import groups
from ..harness.files import write_text
from ..harness.tables import cost_cells, latex, markdown, matrix_lines, spread

FORMAT = 1

# name in results.json: (column title, function of R)
SUMMARY = {
    "overall_performance": ("OP", metrics.overall_performance),
    "plasticity": ("just learned", metrics.plasticity),
    "backward_transfer": ("BWT (unclipped, T-1)", metrics.backward_transfer),
    "trace_backward_transfer": ("BWT (unclipped, T)", metrics.trace_backward_transfer),
    "trace_forgetting": ("BWT (TRACE: clipped, T, sign flipped)", metrics.trace_forgetting),
    "forgetting": ("forgetting (from best)", metrics.forgetting),
}


def summarise(results):
    """The scores that follow from R, those that are defined, by name.

    Args:
        results: what results.json holds. One stage (zero-shot, joint training) has no change over
            time, hence only its overall performance.
    """
    matrix = results["matrix"]
    if len(results["stages"]) == 1:
        return {"overall_performance": mean(matrix[0])} if matrix else {}
    if len(matrix) < len(results["stages"]):
        return {}
    return {name: function(matrix) for name, (_, function) in SUMMARY.items()}


def majority_row(stream, scorers):
    """What always giving a task's most frequent answer scores, by the task's own scorer."""
    row = []
    for task, scorer in zip(stream, scorers, strict=True):
        answers = [example.answer for example in task.test]
        (most, _), *_ = Counter(answers).most_common(1)
        prompts = [example.prompt for example in task.test]
        row.append(scorer.function(prompts, [most] * len(answers), answers))
    return row


def read_results(folders):
    """results.json of several runs.

    Raises:
        FileNotFoundError, ValueError: a folder holds none, or a run that is not complete.
    """
    return tables.read_results(folders, (FORMAT,), "moram trace")


def table(runs):
    """One row a method: means over its runs, with the standard deviation where there are several.

    Args:
        runs: list of results. Runs of one method that differ in order and seed alone are one row;
            where other settings differ, each has a row that names them. All must have the same
            tasks, scored alike.
    Returns:
        (titles, rows of text); the first rows are the majority class and the untrained model.
    Raises:
        ValueError: tasks, metrics, decoding or the scored examples' most frequent answers differ.
    """
    tasks = list(runs[0]["tasks"])
    _check_alike(runs)
    titles = ["method", "runs", *tasks, *(title for title, _ in SUMMARY.values())]
    titles += ["trained / stage", "stored MiB", "seconds / stage", "peak MiB", "task id"]
    rows = [["majority class", "", *_over_tasks(runs[:1], tasks, "majority")]]
    untrained = [run for run in runs if run["untrained"]]
    if untrained:
        rows.append(["untrained", "", *_over_tasks(untrained[:1], tasks, "untrained")])
    for name, group in groups(runs).items():
        last = [dict(zip(run["tasks"], run["matrix"][-1], strict=True)) for run in group]
        row = [name, str(len(group)), *(spread([row[task] for row in last]) for task in tasks)]
        row += [
            spread([run["summary"][key] for run in group if key in run["summary"]])
            for key in SUMMARY
        ]
        row += cost_cells(group, ".1f")
        row.append("yes" if group[0]["needs_task_id"] else "no")
        rows.append(row)
    return titles, [row + [""] * (len(titles) - len(row)) for row in rows]


def _check_alike(runs):
    first = runs[0]
    for run in runs:
        if sorted(run["tasks"]) != sorted(first["tasks"]):
            names = f"{first['tasks']} and {run['tasks']}"
            raise ValueError(f"runs must share their tasks, got {names}")
        for key in ("model", "eval_split", "eval_limit"):
            one, other = (r["settings"].get(key) for r in (first, run))
            if one != other:
                raise ValueError(f"runs must be scored alike, got {key} {one!r} and {other!r}")
        for key in ("metrics", "decoding", "majority"):
            one, other = (dict(zip(r["tasks"], r[key], strict=True)) for r in (first, run))
            for task in one:
                if one[task] != other[task]:
                    raise ValueError(
                        f"runs must be scored alike, got {key} {one[task]} and {other[task]} "
                        f"for {task}"
                    )


def _over_tasks(runs, tasks, key):
    found = dict(zip(runs[0]["tasks"], runs[0][key], strict=True))
    return [f"{found[task]:.1f}" for task in tasks]


def write_report(runs, out):
    """Write table.md, table.csv, table.tex and matrix.png into a folder.

    Args:
        runs: list of results, see `table`.
    """
    from ..harness.plot import draw_matrices

    out = Path(out)
    titles, rows = table(runs)
    notes = [
        f"- {task}: {metric}, decoding {decoding}"
        for task, metric, decoding in zip(
            runs[0]["tasks"], runs[0]["metrics"], runs[0]["decoding"], strict=True
        )
    ]
    text = markdown(titles, rows)
    if len(runs) == 1:
        text += "\nR[t, i], score on task i after training task t:\n\n"
        text += "\n".join(matrix_lines(runs[0])) + "\n"
    write_text(out / "table.md", text + "\nScores in percent:\n\n" + "\n".join(notes) + "\n")
    tables.write_csv(out / "table.csv", titles, rows)
    write_text(out / "table.tex", latex(titles, rows))
    draw_matrices(runs, out / "matrix.png")
