"""Throughput of the adapter alone, against plain torch, over atoms, tokens, width and mode.

    python benchmarks/speed/throughput.py --out out/throughput.csv --plot out/throughput.png
    python benchmarks/speed/throughput.py --plot-only out/throughput.csv

Timed is the update added onto a given base output: the layer without its base Linear, which is the
row "base" of every case (D = O, no bias, frozen weight; in training its backward gives dx only).
Training is forward and backward with gradients for x, the base output and the current atoms.
Inference runs without autograd and with the threshold of `measure.py`. "plain" (`plain.py`) is the
baseline of every ratio; ratios are medians of paired repeats, plain_i / this_i, so above 1 is
faster. `saved_bytes` counts all distinct storages kept for the backward, x and the bank included.
A single token finds its bank in the caches, because short calls repeat back to back.

One CSV row per case and backend, written as soon as it is measured; table and plot are read from
that file. Exit status: 0; 1 if a backend disagrees with the float64 reference; 2 for bad flags.
CUDA timing uses events. It is written with care but no number in this repository comes from it.
"""

import argparse
import csv
import itertools
import platform
import shlex
import subprocess
import sys
from pathlib import Path

# First of all: it puts this checkout on the path, where moram_kernels below is found.
import measure
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from tqdm import tqdm

from moram_kernels.api import BACKENDS, available_backends, why_unavailable

CASE_COLUMNS = ("mode", "D", "tokens", "atoms")
PLAIN_BACKENDS = ("plain", "plain-compiled")
MODES = ("inference", "training")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in measure.ROUNDINGS}
COLUMNS = (
    *("python", "torch", "moram_kernels", "device", "device_name", "threads", "dtype"),
    *("D", "O", "tokens", "atoms", "current_atoms", "top_k", "mode", "backend", "repeats"),
    *("median_ms", "p20_ms", "p80_ms", "tokens_per_s"),
    *("ratio_to_plain", "ratio_to_plain_p20", "ratio_to_plain_p80", "saved_bytes", "command"),
)
SETUP_COLUMNS = ("device_name", "threads", "dtype", "torch", "moram_kernels")
# Okabe and Ito's colours, told apart by readers with any colour vision.
STYLES = {
    "torch": {"color": "#0072B2", "marker": "o"},
    "plain": {"color": "#D55E00", "marker": "s"},
    "plain-compiled": {"color": "#E69F00", "marker": "D"},
    "reference": {"color": "#CC79A7", "marker": "v"},
    "triton": {"color": "#009E73", "marker": "^"},
    "base": {"color": "#777777", "marker": None, "linestyle": "--"},
}


def main(argv=None):
    """Run the program on the arguments (of the shell, if None) and return its exit status."""
    args = parse_args(argv)
    if args.plot_only:
        plot(read_csv(args.plot_only), args.plot)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        sweep(args, shlex.join(["python", *sys.argv] if argv is None else argv))
    except measure.DisagreementError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 1
    rows = read_csv(args.out)
    print(ratio_table(rows))
    plot(rows, args.plot)
    print(f"wrote {args.out} and {args.plot}")
    return 0


def parse_args(argv=None):
    """Read and check the flags; a bad one ends the program with status 2 and one sentence."""
    parser = argparse.ArgumentParser(
        description="Measure the adapter's throughput against plain torch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--atoms", type=_sizes, default="8,64,160,1024,4096", help="atoms, frozen and current")
    add("--tokens", type=_sizes, default="1,1024,4096", help="rows of x")
    add("--widths", type=_sizes, default="768,2048", help="input and output features")
    add("--backends", type=_names, default="plain,torch", help='must include "plain"')
    add("--compile", action="store_true", help="add plain-compiled; needs a C++ compiler on CPU")
    add("--modes", type=_names, default=",".join(MODES), help=f"of {', '.join(MODES)}")
    add("--top-k", type=_size, default=8, help="atoms selected per token")
    add("--atoms-per-task", type=_size, default=8, help="current atoms, at most all")
    add("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--threads", type=_size, help="CPU threads; torch's default if not given")
    add("--repeats", type=_size, default=50, help="most paired repeats of a case")
    add("--case-seconds", type=float, default=15.0, help="time budget for the repeats of a case")
    add("--seed", type=int, default=0, help="of the inputs and of the order of calls")
    add("--out", type=Path, default="out/throughput.csv", help="CSV file, replaced")
    add("--plot", type=Path, default="out/throughput.png", help="PNG file, replaced")
    add("--plot-only", type=Path, metavar="CSV", help="draw this file and measure nothing")
    args = parser.parse_args(argv)
    if args.plot.suffix != ".png":
        parser.error(f"--plot must end in .png, got {args.plot}")
    if args.plot_only:
        if not args.plot_only.is_file():
            parser.error(f"--plot-only must name a CSV file, got {args.plot_only}")
        return args
    for mode in args.modes:
        if mode not in MODES:
            parser.error(f"--modes must be of {', '.join(MODES)}, got {mode!r}")
    if args.compile and "plain-compiled" not in args.backends:
        args.backends.append("plain-compiled")
    for backend in args.backends:
        if backend in BACKENDS and why_unavailable(backend):
            parser.error(f"--backends: {backend} cannot run: {why_unavailable(backend)}")
        known = (*PLAIN_BACKENDS, *available_backends())
        if backend not in known:
            parser.error(f"--backends must be of {', '.join(known)}, got {backend!r}")
    if "plain" not in args.backends:
        parser.error("--backends must include plain, the baseline of every ratio")
    if not args.case_seconds > 0:
        parser.error(f"--case-seconds must be > 0, got {args.case_seconds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return args


def _size(text):
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _sizes(text):
    return sorted({_size(part) for part in text.split(",")})


def _names(text):
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def sweep(args, command):
    """Measure every case of the flags and write the rows to args.out, case by case."""
    common = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moram_kernels": commit(),
        "device": args.device,
        "device_name": device_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "command": command,
    }
    grid = list(itertools.product(args.modes, args.widths, args.tokens, args.atoms))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # disable=None: no bar where stderr is not a terminal.
    with args.out.open("w", newline="", encoding="utf-8") as file, tqdm(grid, disable=None) as bar:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for mode, width, tokens, atoms in bar:
            bar.set_description(f"{mode} D={width} tokens={tokens} atoms={atoms}")
            case = measure.Case(
                mode,
                width,
                tokens,
                atoms,
                top_k=args.top_k,
                atoms_per_task=args.atoms_per_task,
                dtype=DTYPES[args.dtype],
                device=args.device,
                seed=args.seed,
            )
            results = measure.measure_case(case, args.backends, args.repeats, args.case_seconds)
            writer.writerows(common | row for row in _case_rows(case, results))
            file.flush()


def _case_rows(case, results):
    plain_ms = np.array(results["plain"].samples_ms)
    for backend, result in results.items():
        samples_ms = np.array(result.samples_ms)
        p20, median, p80 = np.percentile(samples_ms, (20, 50, 80))
        ratio_p20, ratio, ratio_p80 = np.percentile(plain_ms / samples_ms, (20, 50, 80))
        yield {
            "D": case.width,
            "O": case.width,
            "tokens": case.tokens,
            "atoms": case.atoms,
            "current_atoms": case.current_atoms,
            "top_k": case.top_k,
            "mode": case.mode,
            "backend": backend,
            "repeats": len(samples_ms),
            "median_ms": f"{median:.6g}",
            "p20_ms": f"{p20:.6g}",
            "p80_ms": f"{p80:.6g}",
            "tokens_per_s": f"{case.tokens / median * 1e3:.6g}",
            "ratio_to_plain": f"{ratio:.4g}",
            "ratio_to_plain_p20": f"{ratio_p20:.4g}",
            "ratio_to_plain_p80": f"{ratio_p80:.4g}",
            "saved_bytes": result.saved_bytes,
        }


def commit():
    """Commit of the measured checkout, "-dirty" if its code differs from it, or "unknown"."""

    def git(*words):
        command = ["git", "-C", measure.ROOT, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "moram_kernels", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device):
    """Model name of the GPU, or of the CPU where the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_csv(path):
    """Rows of a CSV that this program wrote, numbers as numbers; others end the program."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            sys.exit(f"throughput.py: {path} lacks the columns {', '.join(sorted(missing))}")
        rows = list(reader)
    if not rows:
        sys.exit(f"throughput.py: {path} has no rows")
    for row in rows:
        for name in ("D", "O", "tokens", "atoms", "current_atoms", "top_k", "saved_bytes"):
            row[name] = int(row[name])
        for name in COLUMNS:
            if name.endswith(("_ms", "_per_s")) or name.startswith("ratio"):
                row[name] = float(row[name])
    return rows


def ratio_table(rows):
    """Text table, a line per case: time of plain and base, and every backend's ratio to plain."""
    cases = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE_COLUMNS), {})[row["backend"]] = row
    backends = [name for name in next(iter(cases.values())) if name not in ("base", "plain")]
    lines = [["mode", "D", "tokens", "atoms", "base ms", "plain ms"]]
    lines[0] += [f"{name}: x faster than plain [p20-p80]" for name in backends]
    for case, results in cases.items():
        line = [str(part) for part in case]
        line += [f"{results[name]['median_ms']:.4g}" for name in ("base", "plain")]
        for name in backends:
            low, mid, high = (results[name][f"ratio_to_plain{p}"] for p in ("_p20", "", "_p80"))
            line.append(f"{mid:.2f} [{low:.2f}-{high:.2f}]")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line) for line in padded)


def plot(rows, path):
    """Draw throughput against atoms, a panel per mode, width and tokens, into a PNG."""
    setups = {tuple(row[name] for name in SETUP_COLUMNS) for row in rows}
    if len(setups) > 1:
        sys.exit(f"throughput.py: one plot shows one setup, the rows have {len(setups)}")
    lines = list(dict.fromkeys((row["mode"], row["D"]) for row in rows))
    columns = sorted({row["tokens"] for row in rows})
    figure = Figure(
        figsize=(1.2 + 3.6 * len(columns), 1.6 + 2.7 * len(lines)), layout="constrained"
    )
    grid = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True)
    for (i, (mode, width)), (j, tokens) in itertools.product(enumerate(lines), enumerate(columns)):
        axes = grid[i, j]
        panel = [r for r in rows if (r["mode"], r["D"], r["tokens"]) == (mode, width, tokens)]
        _draw_panel(axes, panel)
        axes.set_title(f"{mode}, D = O = {width}, {tokens} token{'s' * (tokens > 1)}", fontsize=10)
        if j == 0:
            axes.set_ylabel("tokens / s")
        if i == len(lines) - 1:
            axes.set_xlabel("atoms in the bank")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    name, threads, dtype, torch_version, revision = setups.pop()
    figure.suptitle(
        "Throughput of the adapter alone (numbers: times as fast as plain; bars: p20 to p80)\n"
        f"{name}, {threads} thread{'s' * (threads != '1')}, {dtype}, torch {torch_version}, "
        f"moram_kernels {revision}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_panel(axes, rows):
    for backend in dict.fromkeys(row["backend"] for row in rows):
        points = sorted((r for r in rows if r["backend"] == backend), key=lambda r: r["atoms"])
        atoms = [r["atoms"] for r in points]
        speed = np.array([r["tokens_per_s"] for r in points])
        low = [r["tokens"] / r["p80_ms"] * 1e3 for r in points]
        high = [r["tokens"] / r["p20_ms"] * 1e3 for r in points]
        label = "base Linear alone" if backend == "base" else backend
        spread = (speed - low, high - speed)
        axes.errorbar(atoms, speed, spread, label=label, markersize=4, capsize=2, **STYLES[backend])
        if backend in available_backends():
            for row in points:
                _label_ratio(axes, row, STYLES[backend]["color"])
    axes.set(xscale="log", yscale="log")
    ticks = sorted({row["atoms"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(0.12, 0.18)
    axes.grid(alpha=0.3)


def _label_ratio(axes, row, color):
    # On the far side of the point, as seen from the plain curve.
    faster = row["ratio_to_plain"] >= 1
    label = axes.annotate(
        f"{row['ratio_to_plain']:.2f}x",
        (row["atoms"], row["tokens_per_s"]),
        xytext=(0, 8 if faster else -8),
        textcoords="offset points",
        ha="center",
        va="bottom" if faster else "top",
        fontsize=8,
        color=color,
        zorder=5,
    )
    label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


if __name__ == "__main__":
    sys.exit(main())
