"""Check and time the adapter on a GPU, in one command.

    python benchmarks/speed/gpu.py --out out/gpu            # up to 9 minutes
    python benchmarks/speed/gpu.py --quick --out out/gpu    # about 2
    python benchmarks/speed/gpu.py --plot-only out/gpu/gpu.csv
    python benchmarks/speed/gpu.py --dry-run H100 --out out/dry     # needs no GPU

Every path of the kernels is compared with the float64 reference on the device, and timed: over a
growing bank a prefill, a training step (forward and backward) and decoding, from Python and as a
CUDA graph, with peak memory; for plain torch, its compiled form, the torch backend, the Triton
backend as users call it, and each of its paths. Every time of ours stands beside the model's and
the lower bound. A path that disagrees is not timed in that dtype.

The order (`gpu_agenda.py`) is: the device's own ceilings; parity of the shipped paths; a first
table; the rest of parity; the other times by their worth, until --seconds are over. Meanwhile other
processes compile the kernels ahead, in the same order (`compile_ahead.py`).

In --out: parity.csv and gpu.csv, row by row, summary.txt with the verdicts and tables as they come,
and plots. Ctrl-C or SIGTERM (`timeout`) ends a run early; the table and the plots are still made.

Exit status: 0; 1 if a path disagrees, fails or is slower than plain or torch beyond noise, all
listed; 2 without a GPU or for bad flags; 3 if nothing is wrong so far, but the run was stopped or
its time over before everything was checked. No number in this repository comes from this program.
"""

import argparse
import contextlib
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import compile_ahead
import gpu_agenda
import gpu_cases
import gpu_dry_run
import gpu_measure
import gpu_parity
import gpu_report
import throughput
import torch

from moram_kernels.triton_backend import available
from moram_kernels.triton_backend.plan import _bucket

INTERPRETER = "cpu-interpreter"
QUICK_SECONDS, SECONDS = 110, 500
STOPPED = 3


def main(argv=None):
    """Run the program on the arguments (of the shell, if None) and return its exit status."""
    args = parse_args(argv)
    if args.plot_only:
        print(*gpu_report.plot_all(args.plot_only, args.plot_only.parent), sep="\n")
        return 0
    kind = "all" if args.parity_only else "quick" if args.quick else "default"
    timed = not args.parity_only
    if args.dry_run:
        name = gpu_dry_run.DEVICES[args.dry_run].device
        agenda = gpu_agenda.make_agenda(kind, name, args.quick, timed)
        return gpu_dry_run.run(args.dry_run, agenda, args.quick, args.seconds, args.out)
    reason = why_not(args.device)
    if reason:
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 2
    start = time.monotonic()
    device, machine = "cuda", None
    if args.device == INTERPRETER:
        device, kind, args.workers = "cpu", "interpreter", 0
    if args.workers:
        machine = compile_ahead.this_machine()
    name = gpu_cases.gpu_name(device)
    agenda = gpu_agenda.make_agenda(kind, name, args.quick, timed)
    command = shlex.join(["python", *sys.argv] if argv is None else argv)
    setup = describe(device) | {"command": command}
    with gpu_report.Results(args.out, setup, timed) as results:
        clock = gpu_measure.Clock(args.quick)
        bench = gpu_measure.Bench(clock, start + args.seconds, device, name)
        run = Run(results, bench, start)
        try:
            with (
                stopped_by(signal.SIGTERM),
                compile_ahead.Ahead(agenda.items(), machine, args.workers) as bench.ahead,
            ):
                run.all(agenda)
            stopped = bool(run.unchecked)
        except KeyboardInterrupt:
            stopped = True
            results.say("stopped; what was found so far follows")
        except Exception as error:
            # What was found is worth a table all the same.
            traceback.print_exc()
            run.problems.append(f"{type(error).__name__}: {error}")
        if run.problems:
            print(*run.problems, sep="\n", file=sys.stderr)
        status = conclude(results.rows.path, args.tune, results.say) if timed else 0
    if status or run.problems:
        return 1
    return STOPPED if stopped else 0


@contextlib.contextmanager
def stopped_by(number):
    """A signal raises KeyboardInterrupt in this block, as Ctrl-C does."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)


class Run:
    """A run's checks and times, and what was wrong so far.

    Args:
        results: `gpu_report.Results`. bench: `gpu_measure.Bench`. start: of time.monotonic.
    """

    def __init__(self, results, bench, start):
        self.results, self.bench, self.start = results, bench, start
        self.problems, self.checked, self.unchecked = [], 0, 0

    def all(self, agenda):
        """Do what the agenda says, in its order."""
        if self.results.rows:
            for row in gpu_measure.ceilings(self.bench.clock, self.bench.device):
                self.results.rows.write(row)
        self.check(agenda.first_checks, "parity of the shipped paths")
        gpu_measure.measure_all(self.results.rows, self.bench, agenda.first_timings)
        if agenda.first_timings:
            rows = gpu_report.read_rows(self.results.rows.path)
            self.say(f"first table\n{gpu_report.summarize(rows)}")
        self.check(agenda.checks, "parity")
        gpu_measure.measure_all(self.results.rows, self.bench, agenda.timings)

    def say(self, text):
        """Print and keep a text, with the time since the start."""
        self.results.say(f"[{time.monotonic() - self.start:.0f} s] {text}")

    def check(self, checks, title):
        """Check paths, a row each, and say how many disagree, in all so far."""
        for check in checks:
            if self.bench.left < 0:
                self.unchecked += 1
                self.results.parity.write(check._asdict() | {"verdict": "out of time"})
                continue
            self.bench.ahead.wait(check, self.bench.left)
            start = time.monotonic()
            try:
                found = gpu_parity.check_parity(check, self.bench.device)
            except Exception as error:
                # One path must not end the others.
                found = [f"{check}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]]
            self.checked += 1
            self.problems += found
            if found:
                self.bench.wrong.add((check.path, check.training, check.dtype))
            verdict = "DISAGREES" if found else "agrees"
            row = {"verdict": verdict, "problems": "; ".join(found)}
            self.results.parity.write(check._asdict() | row | {"seconds": time.monotonic() - start})
            print(f"{check}: {verdict}", flush=True)
        if checks:
            left = f", {self.unchecked} not checked in time" if self.unchecked else ""
            self.say(f"{title}: {self.checked} checks, {len(self.problems)} problems{left}")


def parse_args(argv=None):
    """Read and check the flags; a bad one ends the program with status 2 and one sentence."""
    parser = argparse.ArgumentParser(
        description="Check and time the adapter on a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few atom counts and short samples, 2 minutes")
    add("--out", type=Path, default="out/gpu", help="folder of gpu.csv and the plots")
    add("--seconds", type=float, help=f"time budget; {SECONDS}, or {QUICK_SECONDS} if --quick")
    add("--workers", type=int, help="processes that compile ahead; as many as cores, 0 = none")
    add("--tune", type=Path, metavar="JSON", help="write the fastest paths as a plan's table")
    add("--parity-only", action="store_true", help="check all paths, shapes, dtypes; time nothing")
    add("--plot-only", type=Path, metavar="CSV", help="draw this file and measure nothing")
    add(
        "--dry-run", choices=gpu_dry_run.DEVICES, help="compile here, and say how long it all takes"
    )
    add("--device", choices=("cuda", INTERPRETER), default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot_only and not args.plot_only.is_file():
        parser.error(f"--plot-only must name a CSV file, got {args.plot_only}")
    if args.seconds is None:
        budget = QUICK_SECONDS if args.quick else SECONDS
        args.seconds = math.inf if args.parity_only else budget
    if args.workers is None:
        args.workers = len(os.sched_getaffinity(0))
    if not args.seconds > 0:
        parser.error(f"--seconds must be > 0, got {args.seconds}")
    if args.workers < 0:
        parser.error(f"--workers must be >= 0, got {args.workers}")
    if args.device == INTERPRETER and not args.parity_only:
        parser.error(f"--device {INTERPRETER} has no times; add --parity-only")
    return args


def why_not(device):
    """Why nothing can run on a device, one sentence with the remedy, or None."""
    if device == INTERPRETER:
        return None if available.interpreting() else "set TRITON_INTERPRET=1 to interpret kernels"
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device; run this on a machine with an NVIDIA or AMD GPU and a "
            "torch built for it (benchmarks/speed/throughput.py measures on a CPU)"
        )
    if available.interpreting():
        return "TRITON_INTERPRET is set, which interprets kernels on the CPU; unset it"
    return available.why_not()


def describe(device):
    """Device and versions, as columns."""
    import triton

    driver = "none"
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            driver = done.stdout.split("\n")[0].strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
    return {
        "device_name": available.device_name(torch.device(device)),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moram_kernels": throughput.commit(),
    }


def conclude(path, tune=None, say=print):
    """Say and draw what a CSV says and write the tuned table; the exit status."""
    rows = gpu_report.read_rows(path)
    say(gpu_report.summarize(rows))
    drawn = gpu_report.plot_all(path, path.parent)
    print("wrote", path, *drawn)
    if tune:
        tune.parent.mkdir(parents=True, exist_ok=True)
        gpu_report.write_json(tune, gpu_report.tuned_table(rows, plan_key, chosen_path))
        print(f"wrote {tune}; give it to plan(.., table=) or to triton_backend/tuned.json")
    failed, slow = gpu_report.failures(rows), gpu_report.slow_paths(rows)
    for title, sentences in (("failed:", failed), ("slow paths:", slow)):
        if sentences:
            print(title, *sentences, sep="\n", file=sys.stderr)
    return 1 if failed or slow else 0


def _case_of(row):
    return gpu_cases.Case(
        row["mode"], row["D"], row["tokens"], row["atoms"], row["dtype"], row["top_k"]
    )


def plan_key(row):
    """The key of a row's shape in the plan's table."""
    sizes = (_bucket(row["tokens"]), row["D"], row["O"], row["atoms"], row["top_k"])
    purpose = "training" if row["mode"] == "training" else "inference"
    return "x".join(map(str, (*sizes, row["dtype"], purpose)))


def chosen_path(row):
    """The path that the plan takes for a row's shape."""
    here = gpu_cases.gpu_name("cuda")
    device = here if here and here.name == row["device_name"] else row["device_name"]
    return _case_of(row).plan(device).path


if __name__ == "__main__":
    sys.exit(main())
