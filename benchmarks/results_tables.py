"""Markdown tables of what `results/` holds: runs of streams, the demo, speed, model, compiler.

Reads JSON and CSV alone, computes means and standard deviations. Sentences are in results_page.py.
"""

import csv
import json
from statistics import mean, stdev

from moram.continual.metrics import backward_transfer, overall_performance, plasticity

WIDTH = 100
# A run's scores, by their names in its summary; those of images where it has an average.
LANGUAGE = {"overall_performance": "OP", "plasticity": "just learned", "backward_transfer": "BWT"}
IMAGES = {"transfer": "Transfer", "average": "Average", "last": "Last", "forgetting": "Forgetting"}
# Whose times are modelled.
COMPARED = ("plain", "compiled", "ours")
# What is this project's own, by its name.
ADDITIONS, MARK = ("protected", "aligned", "zero-shot first"), " [+]"


def read(path):
    """A JSON file, or the rows of a CSV file as dicts."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))


def markdown(titles, rows):
    """A table as Markdown.

    Args:
        titles: list of text. rows: list of as many texts.
    """
    head, *lines = (f"| {' | '.join(line)} |" for line in (titles, *rows))
    return "\n".join([head, "|" + " --- |" * len(titles), *lines])


def fit(first, groups, single=()):
    """Columns as one or more tables that are no wider than a page.

    Args:
        first: the column that every table begins with, a list of text: its title, then its cells.
        groups: lists of columns, a table each. single: columns that go where there is room.
    """
    tables = [[first, *group] for group in groups]
    for column in single:
        for table in (*tables, [first]):
            if _fits([*table, column]):
                table.append(column)
                break
        if table not in tables:
            tables.append(table)
    found = []
    for table in tables:
        if not _fits(table):
            found.append(fit(first, [], table[1:]))
            continue
        titles, *rows = zip(*table, strict=True)
        found.append(markdown(titles, rows))
    return "\n\n".join(found)


def _fits(columns):
    return max(len(" | ".join(line)) + 4 for line in zip(*columns, strict=True)) <= WIDTH


def spread(values, digits=1):
    """Mean of the values that are there, and standard deviation where they differ."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text if len(set(values)) == 1 else f"{text}±{stdev(values):.{digits}f}"


def scores_of(runs):
    """The scores of a study: {name in the summary: title}."""
    return IMAGES if any("average" in run["summary"] for run in runs) else LANGUAGE


def final(run):
    """The mean score after the last task."""
    return mean(run["matrix"][-1])


def groups(runs):
    """Runs of one row each, by its name, the best final score first."""
    found = {}
    for run in runs:
        found.setdefault(row_name(run), []).append(run)
    return dict(sorted(found.items(), key=lambda item: -mean(map(final, item[1]))))


def row_name(run):
    """The name of a run's row, which says what no other row was given."""
    name = _marked(run["name"])
    if run["needs_task_id"]:
        return f"{name} (told the task)"
    return f"{name} (all at once)" if len(run["stages"]) == 1 and run["stages"][0] else name


def _marked(name):
    return name + MARK if any(addition in name for addition in ADDITIONS) else name


def summary_tables(runs):
    """One row a method: its scores over the stream, its rate, and what it cost."""
    rows, majority = groups(runs), runs[0].get("majority")
    # Of one answer alone, nothing but its score is known.
    extra = [""] * bool(majority)

    def column(title, cell):
        return [title, *map(cell, rows.values()), *extra]

    def costs(group, key):
        return [cost[key] for run in group for cost in run["costs"]]

    summary = [column("runs", lambda group: str(len(group)))]
    for key, title in scores_of(runs).items():
        summary.append(column(title, lambda g, key=key: spread([r["summary"].get(key) for r in g])))
    if majority:
        summary[1][-1] = f"{mean(majority):.1f}"
    summary.append(column("lr", _rates))
    price = [
        column("stored MiB", lambda group: f"{max(costs(group, 'stored_bytes')) / 2**20:.1f}"),
        column("trained", lambda group: f"{max(costs(group, 'trained')):,}"),
        column("s / stage", lambda group: f"{mean(costs(group, 'seconds')):.0f}"),
    ]
    return fit(["method", *rows, *(["majority class"] * bool(majority))], [summary], price)


def task_tables(runs):
    """One row a method: the score on each task after the last one."""
    rows, columns = groups(runs), []
    for place, task in enumerate(runs[0]["tasks"]):
        column = [task]
        for group in rows.values():
            scores = [run["matrix"][-1][run["tasks"].index(task)] for run in group]
            column.append(spread(scores, 0))
        if runs[0].get("majority"):
            column.append(f"{runs[0]['majority'][place]:.0f}")
        columns.append(column)
    last = ["majority class"] * bool(runs[0].get("majority"))
    return fit(["method", *rows, *last], [columns])


def _rates(group):
    if not any(cost["trained"] for cost in group[0]["costs"]):
        return "-"
    return ", ".join(map(_rate, sorted({run["settings"]["lr"] for run in group})))


def _rate(value):
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def cost_table(runs):
    """One row a method: what training it took, for runs too short to have scores."""
    rows = []
    for run in runs:
        costs = run["costs"]
        seconds, peak = mean(c["seconds"] for c in costs), max(c["peak_mib"] for c in costs)
        trained = f"{max(cost['trained'] for cost in costs):,}"
        rows.append([run["name"], trained, f"{seconds:.0f}", f"{peak:.0f}"])
    return markdown(["method", "trained / task", "s / task, with everything", "peak MiB"], rows)


def search_table(runs):
    """One row a method, one column a rate: the scores that the rate was chosen by."""
    images = scores_of(runs) is IMAGES
    keys = ("transfer", "average", "last") if images else ("overall_performance",)
    rates, found = sorted({run["settings"]["lr"] for run in runs}), {}
    for run in runs:
        # Joint training has no order, and so a last score alone.
        scores = [run["summary"].get(key) for key in keys]
        cell = "/".join("-" if score is None else f"{score:.1f}" for score in scores)
        found.setdefault(_marked(run["name"].split(", lr")[0]), {})[run["settings"]["lr"]] = cell
    rows = [[name, *(cells.get(rate, "-") for rate in rates)] for name, cells in found.items()]
    return markdown(["method", *map(_rate, rates)], rows)


def probe_table(rows):
    """What a ridge finds in each run's features on every domain, and what scoring takes."""
    tasks = [name.removeprefix("probe ") for name in rows[0] if name.startswith("probe ")]
    titles = ["method", "Last", "ridge", *tasks, "ms / image"]
    keys = ["last", "probe", *(f"probe {task}" for task in tasks), "ms_image"]
    return markdown(titles, [[row["name"], *(row[key] or "-" for key in keys)] for row in rows])


def demo_tables(results):
    """The accuracy matrices of a demo, and what follows from them."""
    tasks, rows, scores = results["tasks"], [], []
    rows.append(["majority class", *(f"{value:.0f}" for value in results["majority"])])
    rows.append(["untrained", *(f"{value:.0f}" for value in results["untrained"])])
    for name, run in results["methods"].items():
        label, matrix = _marked(name), run["matrix"]
        for task, row in zip(tasks, matrix, strict=True):
            cells = ("-" if value is None else f"{value:.0f}" for value in row)
            rows.append([f"{label}, after {task}", *cells])
        numbers = overall_performance(matrix), plasticity(matrix), backward_transfer(matrix)
        cells = (*(f"{n:.1f}" for n in numbers), _rate(run["lr"]), f"{max(run['trained']):,}")
        scores.append([label, *cells])
    titles = ["method", *LANGUAGE.values(), "lr", "trained / task"]
    return markdown(["accuracy, percent", *tasks], rows), markdown(titles, scores)


def share_table(shares):
    """Which task's atoms write on which task's inputs, percent of the weight."""
    tasks = shares["tasks"]
    rows = [
        [f"{name}: on {task}", *(f"{value:.0f}" for value in row)]
        for name, matrix in shares["share"].items()
        for task, row in zip(tasks, matrix, strict=True)
    ]
    return markdown(["weight (percent) of the atoms of", *tasks], rows)


def speed_table(rows):
    """Times faster than plain torch: one row for each width, number of tokens and mode."""
    timed = [row for row in rows if row["backend"] == "torch"]
    atoms = sorted({int(row["atoms"]) for row in timed})
    found = {}
    for row in timed:
        case = (row["D"], row["tokens"], row["mode"])
        found.setdefault(case, {})[int(row["atoms"])] = f"{float(row['ratio_to_plain']):.3g}"
    lines = [[*case, *(cells.get(count, "-") for count in atoms)] for case, cells in found.items()]
    return markdown(["D = O", "tokens", "mode", *(f"{count} atoms" for count in atoms)], lines)


def compiled_table(rows):
    """Times faster than plain torch, of plain torch compiled and of the torch backend."""
    cases = {}
    for row in rows:
        case = cases.setdefault((row["mode"], row["atoms"]), {})
        case[row["backend"]] = f"{float(row['ratio_to_plain']):.2f}"
    lines = [[*case, cells["plain-compiled"], cells["torch"]] for case, cells in cases.items()]
    return markdown(["mode", "atoms", "compiled plain", "torch backend"], lines)


def saving_table(rows):
    """What the image harness saves."""
    titles = ["what", "without, s", "with, s", "times as fast"]
    keys = ("without_s", "with_s", "ratio")
    return markdown(titles, [[row["what"], *(row[key] for key in keys)] for row in rows])


def many_tasks_table(rows):
    """What a layer costs at inference after many tasks, and what it keeps."""
    found = {}
    for row in rows:
        cell = f"{row['us_per_token']} ({row['ratio_to_base']})"
        case = found.setdefault((row["tasks"], row["tokens"]), {})
        case[row["layer"]] = cell if row["layer"] == "base" else f"{cell}, {_mib(row['bytes'])}"
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = [[*case, *(cells.get(name, "-") for name in layers)] for case, cells in found.items()]
    return markdown(["tasks", "tokens", *layers], lines)


def lora_table(rows):
    """Times in a language model, LoRA = 1: one row a mode."""
    found = {}
    for row in rows:
        low, middle, high = (float(row[f"ratio{end}"]) for end in ("_p20", "", "_p80"))
        cell = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        found.setdefault(row["mode"], {})[int(row["atoms"])] = cell
    atoms = sorted({count for cells in found.values() for count in cells})
    lines = [[mode, *(cells.get(count, "-") for count in atoms)] for mode, cells in found.items()]
    return markdown(["LoRA of rank 8 = 1", *(f"{count} atoms" for count in atoms)], lines)


def _mib(size):
    return f"{int(size) / 2**20:.1f} MiB"


def model_tables(rows):
    """Device times, and times as called from Python, of every case of the model."""
    device, host = [], []
    for row in rows:
        name = f"{row['name']}, {row['mode'] if row['pass'] == 'forward' else 'backward'}"
        sizes = f"{row['tokens']}, {row['D']} -> {row['O']}, {row['atoms']}, {row['top_k']}"
        times = [row[f"{who}_device_us"] for who in COMPARED]
        ratios = [row[key] for key in ("plain_over_ours_graphs", "ours_over_bound")]
        cells = [*map(_number, (*times, row["bound_us"])), *(f"{float(r):.1f}" for r in ratios)]
        device.append([name, row["path"], *cells])
        host.append([name, sizes, *(_number(row[f"{who}_us"]) for who in COMPARED)])
    ratios = ["plain / ours", "ours / bound"]
    return (
        markdown(["layer", "path", *COMPARED, "bound", *ratios], device),
        markdown(["layer", "M, D -> O, N, top_k", *COMPARED], host),
    )


def _number(text):
    value = float(text)
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def gate_table(golden):
    """Configurations of each kernel, and over them the most registers, shared memory and length."""
    targets, kinds = [target for target in golden if target != "triton"], {}
    for target in targets:
        for label, facts in golden[target].items():
            kinds.setdefault(label.split()[0], {}).setdefault(target, []).append(facts)
    # Three targets a table, because a page is narrow.
    parts = [targets[start : start + 3] for start in range(0, len(targets), 3)]
    return "\n\n".join(
        markdown(
            ["kernel", *part],
            [[kind, *(_facts(found.get(t, ())) for t in part)] for kind, found in kinds.items()],
        )
        for part in parts
    )


def version(golden):
    """The Triton version of recorded numbers, to be compared."""
    return tuple(map(int, golden["triton"].split(".")))


def most_stack(golden):
    """The most bytes of stack that any configuration takes."""
    found = (entries.values() for target, entries in golden.items() if target != "triton")
    return max(facts["stack"] for entries in found for facts in entries)


def _facts(configurations):
    if not configurations:
        return "-"
    registers, shared, length = (
        max(facts[key] for facts in configurations)
        for key in ("registers", "shared", "instructions")
    )
    return f"{len(configurations)}: {registers}, {-(-shared // 1024)}, {length}"
