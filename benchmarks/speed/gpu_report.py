"""What `gpu.py` makes of its rows: the files, slow paths, the table of fastest paths, the plots.

Plots and conclusions read the CSV and nothing else. Times are milliseconds; "graph" rows were
replayed as a CUDA graph, all others are launched from Python every time.
"""

import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLUMNS = (
    *("device_name", "driver", "cuda", "python", "torch", "triton", "moram_kernels", "dtype"),
    *("mode", "D", "O", "tokens", "atoms", "current_atoms", "top_k", "contender", "path"),
    *("graph", "status", "median_ms", "p20_ms", "p80_ms", "tokens_per_s", "peak_memory_mib"),
    *("model_ms", "bound_ms", "over_model", "over_bound", "gb_per_s", "tflops_per_s", "command"),
)
PARITY_COLUMNS = (
    *("path", "training", "tokens", "atoms", "width", "top_k", "dtype", "verdict", "problems"),
    "seconds",
)
CASE = ("mode", "D", "tokens", "atoms", "dtype", "top_k")
INTEGERS = ("D", "O", "tokens", "atoms", "current_atoms", "top_k")
NUMBERS = (
    *("median_ms", "p20_ms", "p80_ms", "tokens_per_s", "peak_memory_mib", "model_ms", "bound_ms"),
    *("over_model", "over_bound", "gb_per_s", "tflops_per_s"),
)
OK, FAILED = "ok", "failed"
# Okabe and Ito's colours, told apart by readers with any colour vision.
STYLES = {
    "plain": {"color": "#D55E00", "marker": "s"},
    "plain-compiled": {"color": "#E69F00", "marker": "D"},
    "torch": {"color": "#0072B2", "marker": "o"},
    "triton": {"color": "#009E73", "marker": "^"},
}
# A path that beats the plan's own choice by less is not worth an entry in the table.
WORTH = 1.05


class Writer:
    """A CSV file whose rows reach the disk one by one; `common` goes into each."""

    def __init__(self, path, common, columns=COLUMNS):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("w", newline="", encoding="utf-8")
        self.writer, self.common = csv.DictWriter(self.file, columns), common
        self.writer.writeheader()
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, row):
        """Write one row; columns it lacks stay empty, numbers are cut to six digits."""
        row = self.common | row
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


class Results:
    """The files of a run in a folder: parity.csv, summary.txt and, if it is timed, gpu.csv.

    Every row and line is on disk at once, so that a run that is stopped leaves what it found.
    """

    def __init__(self, folder, setup, timed):
        self.rows = Writer(folder / "gpu.csv", setup) if timed else None
        self.parity = Writer(folder / "parity.csv", {}, PARITY_COLUMNS)
        self.summary = (folder / "summary.txt").open("w", encoding="utf-8")
        self.say("\n".join(f"{name}: {value}" for name, value in setup.items()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.parity.file.close()
        self.summary.close()
        if self.rows:
            self.rows.file.close()

    def say(self, text):
        """Print a text, and keep it in summary.txt."""
        for file in (sys.stdout, self.summary):
            print(text, file=file, flush=True)


def read_rows(path):
    """Rows of a CSV that this program wrote, numbers as numbers, empty ones as None.

    Raises:
        ValueError: a column is missing.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        rows = list(reader)
    for row in rows:
        for name in INTEGERS:
            row[name] = int(row[name]) if row[name] else None
        for name in NUMBERS:
            row[name] = float(row[name]) if row[name] else None
    return rows


def slow_paths(rows):
    """A sentence for every case where "triton" is slower than plain or torch beyond noise.

    Beyond noise: its fast fifth percentile, p20, is above the other's p80.
    """
    sentences = []
    for key, results in by_case(rows).items():
        ours = results.get("triton")
        for name in ("plain", "torch"):
            other = results.get(name)
            if ours and other and ours["p20_ms"] > other["p80_ms"]:
                mode, width, tokens, atoms, dtype, _, graph = key
                how = " in a CUDA graph" if graph == "yes" else ""
                sentences.append(
                    f"{mode}{how}, {tokens} tokens, {width} -> {width}, {atoms} atoms, {dtype}: "
                    f"triton ({ours['path']}) {ours['median_ms']:.4g} ms, {name} "
                    f"{other['median_ms']:.4g} ms"
                )
    return sentences


def by_case(rows):
    """{(case.., graph): {contender: row}} of the rows that were timed."""
    cases = {}
    for row in rows:
        if row["mode"] != "ceiling" and row["status"] == OK and row["median_ms"] is not None:
            key = (*(row[name] for name in CASE), row["graph"])
            cases.setdefault(key, {})[row["contender"]] = row
    return cases


def summarize(rows):
    """The ceilings, and a table: each case's medians, "triton" beside plain, model and bound."""
    ceilings = [
        f"{row['contender']} {row['dtype']}: "
        + (
            f"{row['gb_per_s']:.0f} GB/s"
            if row["gb_per_s"]
            else f"{row['tflops_per_s']:.0f} TFLOP/s"
        )
        for row in rows
        if row["mode"] == "ceiling"
    ]
    rows = [row for row in rows if row["mode"] != "ceiling"]
    names = [*STYLES, *sorted({r["contender"] for r in rows if r["contender"].startswith("tri")})]
    names = [n for n in dict.fromkeys(names) if any(r["contender"] == n for r in rows)]
    lines = [["case", *(f"{name} ms" for name in names), "plain/triton"]]
    lines[0] += ["triton/model", "triton/bound"]
    for key, results in by_case(rows).items():
        mode, width, tokens, atoms, _, _, graph = key
        line = [f"{mode}{' graph' if graph == 'yes' else ''} D{width} M{tokens} N{atoms}"]
        line += [f"{results[n]['median_ms']:.4g}" if n in results else "-" for n in names]
        ours, plain = results.get("triton"), results.get("plain")
        both = ours and plain
        line.append(f"{plain['median_ms'] / ours['median_ms']:.2f}" if both else "-")
        for name in ("over_model", "over_bound"):
            line.append(f"{ours[name]:.2f}" if ours and ours[name] else "-")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join([*ceilings, *("  ".join(line) for line in padded)])


def failures(rows):
    """A sentence for every call that raised."""
    return [
        f"{row['contender']}, {row['mode']}, {row['tokens']} tokens, {row['D']} -> {row['O']}, "
        f"{row['atoms']} atoms: {row['status']}"
        for row in rows
        if row["status"].startswith(FAILED)
    ]


def tuned_table(rows, plan_key, chosen_path):
    """{device: {"paths": {key: path}, "tiles": {}}}: where another path beats the plan's choice.

    Args:
        plan_key: row -> key of the plan's table.
        chosen_path: row -> the path that the plan takes without a table.
    """
    tables, shapes = {}, {}
    for row in rows:
        name, _, path = row["contender"].partition("/")
        if name == "triton" and path and row["status"] == OK and row["graph"] == "no":
            shapes.setdefault((row["device_name"], plan_key(row)), {})[path] = row
    for (device, key), paths in shapes.items():
        entry = tables.setdefault(device, {"paths": {}, "tiles": {}})
        best = min(paths, key=lambda path: paths[path]["median_ms"])
        own = chosen_path(paths[best])
        if own not in paths or paths[own]["median_ms"] > WORTH * paths[best]["median_ms"]:
            entry["paths"][key] = best
    return tables


def write_json(path, table):
    """Write a table, keys sorted."""
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def plot_all(csv_path, folder):
    """Draw what a CSV holds into PNGs in a folder; the paths of those that have data."""
    rows = [row for row in read_rows(csv_path) if row["contender"] in STYLES]
    timed = [row for results in by_case(rows).values() for row in results.values()]
    through = [row for row in timed if row["mode"] != "decode" and row["graph"] == "no"]
    decode = [row for row in timed if row["mode"] == "decode"]
    memory = [row for row in through if row["peak_memory_mib"]]
    drawn = []
    for name, data, column, label in (
        ("throughput", through, "tokens_per_s", "tokens / s"),
        ("decode", decode, "median_ms", "latency of a call, ms"),
        ("memory", memory, "peak_memory_mib", "peak memory of a call, MiB"),
    ):
        if data:
            drawn.append(folder / f"{name}.png")
            _plot(data, column, label, drawn[-1])
    return drawn


def _plot(rows, column, label, path):
    """A panel per mode, width and tokens; solid from Python, dotted as a CUDA graph."""
    keys = list(dict.fromkeys((r["mode"], r["D"], r["tokens"]) for r in rows))
    figure = Figure(figsize=(1 + 3.6 * len(keys), 3.9), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        panel = [r for r in rows if (r["mode"], r["D"], r["tokens"]) == key]
        for name, graph in dict.fromkeys((r["contender"], r["graph"]) for r in panel):
            points = [r for r in panel if (r["contender"], r["graph"]) == (name, graph)]
            points.sort(key=lambda r: r["atoms"])
            style = STYLES[name] | {"linestyle": ":" if graph == "yes" else "-"}
            shown = f"{name}, CUDA graph" if graph == "yes" else name
            xs = [r["atoms"] for r in points]
            axes.plot(xs, [r[column] for r in points], label=shown, markersize=4, **style)
        axes.set(xscale="log", yscale="log", xlabel="atoms in the bank")
        axes.set_title(f"{key[0]}, {key[1]} -> {key[1]}, M = {key[2]}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    handles = {}
    for axes in panels:
        handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False
    )
    row = rows[0]
    figure.suptitle(
        f"{row['device_name']}, {row['dtype']}, torch {row['torch']}, triton {row['triton']}, "
        f"moram_kernels {row['moram_kernels']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
