"""Results of X-TAIL as numbers and tables, beside the published ones."""

from collections.abc import Sequence
from statistics import mean

from ..continual import metrics, published
from ..harness.compare import groups
from ..harness.files import Results
from ..harness.report import Report
from ..harness.tables import Table, spread
from .data.catalog import XTAIL
from .settings import XtailSettings

# method: the names of its published row and forgetting.
PUBLISHED = {
    "moram": ("MoRAM", ""),
    "lora": ("LoRA", "LoRA rank 16"),
    "moe-adapters": ("MoE-Adapter", "MoE-Adapter"),
    "rail-primal": ("RAIL-Primal", ""),
    "codyra": ("CoDyRA", "CoDyRA"),
    "zero-shot": ("Zero-shot", ""),
}


class XtailReport(Report):
    """`Report` of `moram xtail`; published rows follow where the runs are of that protocol."""

    format = "xtail-1"
    command = "moram xtail"
    settings = XtailSettings
    summary = {  # noqa: RUF012
        "transfer": ("Transfer", metrics.transfer),
        "average": ("Average", metrics.average),
        "last": ("Last", metrics.last),
        "forgetting": ("Forgetting", metrics.forgetting),
    }
    shows_tasks = False
    unit = "task"
    stored = ".2f"
    legend = "R[t, i], accuracy on dataset i after learning dataset t:"

    def summarise(self, results: Results) -> dict[str, float]:
        """As `Report.summarise`; a model that never changes has all scores, joint training one."""
        matrix = whole_matrix(results)
        if len(matrix) == len(results["tasks"]):
            names = [name for name in self.summary if name != "transfer" or len(matrix) > 1]
            return {name: self.summary[name][1](matrix) for name in names}
        # A run that is not complete has fewer rows than stages.
        return {"last": mean(matrix[0])} if len(matrix) == len(results["stages"]) == 1 else {}

    def after(self, run: Results) -> list[list[str]]:
        return _published_row(run)

    def tables(self, runs: list[Results]) -> list[Table]:
        return [self.table(runs), self.dataset_table(runs)]

    def dataset_table(self, runs: list[Results]) -> Table:
        """Three rows a method: Transfer, Average and Last of each dataset.

        Args, Raises: see `table`.
        Returns:
            (titles, rows of text).
        """
        self.check_alike(runs)
        tasks = runs[0]["tasks"]
        rows = []
        for name, group in groups(runs, XtailSettings).items():
            found = [run for run in group if len(whole_matrix(run)) == len(tasks)]
            if not found:
                # Joint training has no order, and so no past.
                last = [dict(zip(run["tasks"], run["matrix"][-1], strict=True)) for run in group]
                rows.append(
                    [name, "Last", *(spread([row[task] for row in last]) for task in tasks)]
                )
            # Runs of one method may learn the datasets in different orders.
            scores = [(run["tasks"], per_dataset(whole_matrix(run))) for run in found]
            for metric in ("Transfer", "Average", "Last"):
                by_task = [dict(zip(order, s[metric], strict=True)) for order, s in scores]
                if by_task:
                    rows.append(
                        [name, metric, *(spread([b[task] for b in by_task]) for task in tasks)]
                    )
            rows += _published_datasets(group[0])
        return ["method", "metric", *(_title(runs[0], task) for task in tasks)], rows

    def check_alike(self, runs: list[Results]) -> None:
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

    def notes(self, runs: list[Results]) -> str:
        total = sum(runs[0]["classes"])
        # Earlier versions did not say it.
        told = dict.fromkeys(run["name"] for run in runs if run.get("needs_task_id"))
        among = f"Accuracies in percent among all {total} classes, without a hint of the dataset"
        return "; ".join([among, *(f"{name} was told it" for name in told)]) + "."


REPORT = XtailReport()


def whole_matrix(results: Results) -> list[list[float]]:
    """R with a row for each dataset; of a model that never changes, the same row each time."""
    matrix, tasks = results["matrix"], results["tasks"]
    if results["stages"] == [[]] and matrix:
        return matrix * len(tasks)
    return matrix


def per_dataset(matrix: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
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


def is_published_protocol(run: Results) -> bool:
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


def _published_row(run: Results) -> list[list[str]]:
    names = PUBLISHED.get(run["method"])
    if names is None or not is_published_protocol(run):
        return []
    numbers = [*published.XTAIL[names[0]], published.XTAIL_FORGETTING.get(names[1])]
    cells = ["-" if number is None else f"{number:.1f}" for number in numbers]
    return [[f"{names[0]} (published)", "", *cells]]


def _title(run: Results, task: str) -> str:
    """A dataset's name; with how many classes are scored, where some have no test image."""
    lost = len(run.get("unscored", {}).get(task, ()))
    total = run["classes"][run["tasks"].index(task)]
    return f"{task} ({total - lost} of {total} classes)" if lost else task


def _published_datasets(run: Results) -> list[list[str]]:
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
