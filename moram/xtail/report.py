"""Results of X-TAIL as numbers and tables, beside the published ones."""

from pathlib import Path
from statistics import mean

from ..continual import metrics, published
from ..harness import tables
from ..harness.compare import groups
from ..harness.files import write_text
from ..harness.tables import cost_cells, latex, markdown, matrix_lines, spread
from .catalog import XTAIL

FORMAT = "xtail-1"

# name in results.json: (column title, function of R)
SUMMARY = {
    "transfer": ("Transfer", metrics.transfer),
    "average": ("Average", metrics.average),
    "last": ("Last", metrics.last),
    "forgetting": ("Forgetting", metrics.forgetting),
}
# method: the names of its published row and forgetting.
PUBLISHED = {
    "moram": ("MoRAM", ""),
    "lora": ("LoRA", "LoRA rank 16"),
    "moe-adapters": ("MoE-Adapter", "MoE-Adapter"),
    "rail-primal": ("RAIL-Primal", ""),
    "codyra": ("CoDyRA", "CoDyRA"),
    "zero-shot": ("Zero-shot", ""),
}


def whole_matrix(results):
    """R with a row for each dataset; of a model that never changes, the same row each time."""
    matrix, tasks = results["matrix"], results["tasks"]
    if results["stages"] == [[]] and matrix:
        return matrix * len(tasks)
    return matrix


def summarise(results):
    """The scores that follow from R, those that are defined, by name.

    Args:
        results: what results.json holds. Joint training has no order of tasks, hence only `last`.
    """
    matrix = whole_matrix(results)
    if len(matrix) == len(results["tasks"]):
        names = [name for name in SUMMARY if name != "transfer" or len(matrix) > 1]
        return {name: SUMMARY[name][1](matrix) for name in names}
    # A run that is not complete has fewer rows than stages.
    return {"last": mean(matrix[0])} if len(matrix) == len(results["stages"]) == 1 else {}


def per_dataset(matrix):
    """Transfer, Average and Last of each dataset.

    Args:
        matrix: R, one row for each of T datasets.
    Returns:
        {"Transfer": [T], "Average": [T], "Last": [T]}; the first dataset has no transfer: None.
    """
    columns = list(zip(*matrix, strict=True))
    return {
        "Transfer": [mean(column[:i]) if i else None for i, column in enumerate(columns)],
        "Average": [mean(column) for column in columns],
        "Last": [column[-1] for column in columns],
    }


def read_results(folders):
    """results.json of several runs.

    Raises:
        FileNotFoundError, ValueError: a folder holds none, or a run that is not complete.
    """
    return tables.read_results(folders, (FORMAT,), "moram xtail")


def table(runs):
    """One row a method: means over its runs, with the standard deviation where there are several.

    Args:
        runs: list of results. Runs of one method that differ in order and seed alone are one row;
            where other settings differ, each has a row that names them. All must have the same
            datasets and test images.
    Returns:
        (titles, rows of text); a published row follows the methods that have one, if the runs
        follow the published protocol.
    Raises:
        ValueError: datasets, test images or model differ.
    """
    _check_alike(runs)
    titles = ["method", "runs", *(title for title, _ in SUMMARY.values())]
    titles += ["trained / task", "stored MiB", "seconds / task", "peak MiB"]
    rows = []
    for name, group in groups(runs).items():
        row = [name, str(len(group))]
        row += [spread([r["summary"].get(key) for r in group]) for key in SUMMARY]
        row += cost_cells(group, ".2f")
        rows.append(row)
        rows += _published_row(group[0])
    return titles, [row + [""] * (len(titles) - len(row)) for row in rows]


def is_published_protocol(run):
    """Whether a run is of the datasets, model and scoring of the published rows."""
    settings = run["settings"]
    expected = {"backbone": "ViT-B-16", "shots": 16, "spaces": False}
    expected |= {"eval_limit": None, "held_out": False}
    return (
        tuple(run["tasks"]) == XTAIL
        and not run.get("unscored")
        and settings["pretrained"] in ("auto", "openai")
        and all(settings[name] == value for name, value in expected.items())
    )


def _published_row(run):
    names = PUBLISHED.get(run["method"])
    if names is None or not is_published_protocol(run):
        return []
    numbers = [*published.XTAIL[names[0]], published.XTAIL_FORGETTING.get(names[1])]
    cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
    return [[f"{names[0]} (published)", "", *cells]]


def dataset_table(runs):
    """Three rows a method: Transfer, Average and Last of each dataset.

    Args, Raises: see `table`.
    Returns:
        (titles, rows of text).
    """
    _check_alike(runs)
    tasks = runs[0]["tasks"]
    rows = []
    for name, group in groups(runs).items():
        found = [run for run in group if len(whole_matrix(run)) == len(tasks)]
        if not found:
            # Joint training has no order, and so no past.
            last = [dict(zip(run["tasks"], run["matrix"][-1], strict=True)) for run in group]
            rows.append([name, "Last", *(spread([row[task] for row in last]) for task in tasks)])
        # Runs of one method may learn the datasets in different orders.
        scores = [(run["tasks"], per_dataset(whole_matrix(run))) for run in found]
        for metric in ("Transfer", "Average", "Last"):
            by_task = [dict(zip(order, s[metric], strict=True)) for order, s in scores]
            if by_task:
                rows.append([name, metric, *(spread([b[task] for b in by_task]) for task in tasks)])
        rows += _published_datasets(group[0])
    return ["method", "metric", *(_title(runs[0], task) for task in tasks)], rows


def _title(run, task):
    """A dataset's name; with how many classes are scored, where some have no test image."""
    lost = len(run.get("unscored", {}).get(task, ()))
    total = run["classes"][run["tasks"].index(task)]
    return f"{task} ({total - lost} of {total} classes)" if lost else task


def _published_datasets(run):
    if not is_published_protocol(run):
        return []
    name = PUBLISHED.get(run["method"], ("",))[0]
    found = published.XTAIL_PER_DATASET.get(name)
    lines = list(zip(("Transfer", "Average", "Last"), found, strict=True)) if found else []
    if run["method"] == "zero-shot":
        lines = [("Last", published.XTAIL_ZERO_SHOT)]
    if run["method"] == "joint":
        name, lines = "each dataset alone", [("Last", published.XTAIL_FINE_TUNED)]
    return [
        [f"{name} (published)", metric, *("-" if v is None else f"{v:.1f}" for v in values)]
        for metric, values in lines
    ]


def _check_alike(runs):
    first = runs[0]
    for run in runs:
        for key in ("tasks", "classes", "test_images"):
            one, other = first[key], run[key]
            if sorted(map(str, one)) != sorted(map(str, other)):
                raise ValueError(f"runs must share their {key}, got {one} and {other}")
        # Earlier versions did not say it.
        one, other = (r.get("unscored", {}) for r in (first, run))
        if one != other:
            raise ValueError(f"runs must share their unscored, got {one} and {other}")
        for key in ("backbone", "pretrained", "shots"):
            one, other = (r["settings"][key] for r in (first, run))
            if one != other:
                raise ValueError(f"runs must be alike, got {key} {one!r} and {other!r}")


def write_report(runs, out):
    """Write table.md, table.csv, table.tex and matrix.png into a folder.

    Args:
        runs: list of results, see `table`.
    """
    from ..harness.plot import draw_matrices

    out = Path(out)
    main, each = table(runs), dataset_table(runs)
    text = markdown(*main) + "\n" + markdown(*each)
    if len(runs) == 1:
        text += "\nR[t, i], accuracy on dataset i after learning dataset t:\n\n"
        text += "\n".join(matrix_lines(runs[0])) + "\n"
    total = sum(runs[0]["classes"])
    text += f"\nAccuracies in percent among all {total} classes, without a hint of the dataset.\n"
    write_text(out / "table.md", text)
    # Both tables as one sheet: the second one's rows carry the datasets' names as columns.
    width = max(len(main[0]), len(each[0]))
    sheet = [main[0], *main[1], [], each[0], *each[1]]
    tables.write_csv(
        out / "table.csv",
        sheet[0] + [""] * (width - len(sheet[0])),
        [row + [""] * (width - len(row)) if row else [] for row in sheet[1:]],
    )
    write_text(out / "table.tex", latex(*main) + "\n" + latex(*each))
    draw_matrices(runs, out / "matrix.png")
