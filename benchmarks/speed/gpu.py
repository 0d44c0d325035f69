"""Check and time the adapter on a GPU, in one command.

    python benchmarks/speed/gpu.py --out out/gpu            # up to 9 minutes
    python benchmarks/speed/gpu.py --quick --out out/gpu    # about 2
    python benchmarks/speed/gpu.py --plot-only out/gpu/gpu.csv

First every path of the kernels is compared with the float64 reference on the device. Then, one CSV
row at a time: the device's own ceilings (copies, products), and over a growing bank the time of a
prefill, of a training step (forward and backward) and of decoding, the latter two ways, from Python
and as a CUDA graph, with peak memory; for plain torch, its compiled form, the torch backend, the
Triton backend as users call it, and each of its paths. Every time of ours stands beside the model's
and the lower bound. Cases are taken in the order of their worth until --seconds are over.

Exit status: 0; 1 if a path disagrees, fails or is slower than plain or torch beyond noise, all
listed; 2 without a GPU or for bad flags. No number in this repository comes from this program.
"""

import argparse
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import baseline_model
import gpu_cases
import gpu_parity
import gpu_report
import roofline
import throughput
import torch

from moram_kernels.triton_backend import available, cost
from moram_kernels.triton_backend.plan import _bucket

INTERPRETER = "cpu-interpreter"
# What plain is not tried at: more than this share of the memory that is free.
FREE_SHARE = 0.9
QUICK_SECONDS, SECONDS = 110, 500


def main(argv=None):
    """Run the program on the arguments (of the shell, if None) and return its exit status."""
    args = parse_args(argv)
    if args.plot_only:
        print(*gpu_report.plot_all(args.plot_only, args.plot_only.parent), sep="\n")
        return 0
    reason = why_not(args.device)
    if reason:
        print(f"gpu.py: {reason}", file=sys.stderr)
        return 2
    start = time.monotonic()
    device = "cpu" if args.device == INTERPRETER else "cuda"
    command = shlex.join(["python", *sys.argv] if argv is None else argv)
    setup = describe(device) | {"command": command}
    print("\n".join(f"{name}: {value}" for name, value in setup.items()), flush=True)
    kind = "all" if args.parity_only else "quick" if args.quick else "default"
    problems = run_parity(device, "interpreter" if device == "cpu" else kind)
    if args.parity_only or problems:
        # What is wrong is not timed.
        print(*problems, sep="\n", file=sys.stderr)
        return 1 if problems else 0
    path = args.out / "gpu.csv"
    with gpu_report.Writer(path, setup) as writer:
        measure_all(writer, Clock(args.quick), args.quick, start + args.seconds)
    return conclude(path, args.tune)


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
    add("--tune", type=Path, metavar="JSON", help="write the fastest paths as a plan's table")
    add("--parity-only", action="store_true", help="check all paths, shapes, dtypes; time nothing")
    add("--plot-only", type=Path, metavar="CSV", help="draw this file and measure nothing")
    add("--device", choices=("cuda", INTERPRETER), default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot_only and not args.plot_only.is_file():
        parser.error(f"--plot-only must name a CSV file, got {args.plot_only}")
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    if not args.seconds > 0:
        parser.error(f"--seconds must be > 0, got {args.seconds}")
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


def run_parity(device, kind):
    """Check every path; sentences about what is wrong. kind: as for `gpu_parity.list_checks`."""
    problems, checks = [], gpu_parity.list_checks(kind)
    for check in checks:
        found = gpu_parity.check_parity(check, device)
        print(f"{check}: {'DISAGREES' if found else 'agrees'}", flush=True)
        problems += found
    print(f"parity: {len(checks)} checks, {len(problems)} problems", flush=True)
    return problems


class Clock:
    """Milliseconds (median, p20, p80) of a call on the GPU, by events, with the caches flushed."""

    def __init__(self, quick=False):
        self.repeat_ms = 15 if quick else 40

    def __call__(self, call, graph):
        """Time a call; graph: as a CUDA graph, which leaves out Python and keeps the caches."""
        from triton import testing

        how = {"quantiles": (0.5, 0.2, 0.8)}
        if graph:
            return testing.do_bench_cudagraph(call, rep=self.repeat_ms, **how)
        return testing.do_bench(call, warmup=10, rep=self.repeat_ms, **how)

    def memory(self, call):
        """Peak MiB that one call allocates beyond what is there."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free_bytes(self):
        """Bytes that could be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def measure_all(writer, clock, quick, deadline, device="cuda", cases=None):
    """Measure the ceilings and every case until the deadline (of time.monotonic)."""
    name = gpu_cases.gpu_name(device)
    for row in ceilings(clock, device):
        writer.write(row)
    for case in gpu_cases.list_cases(quick) if cases is None else cases:
        if time.monotonic() > deadline:
            writer.write(case_columns(case) | {"contender": "all", "status": "out of time"})
            continue
        print(f"{deadline - time.monotonic():.0f} s left: {case}", flush=True)
        for row in measure_case(case, clock, quick, deadline, device, name):
            writer.write(case_columns(case) | row)


def ceilings(clock, device, size=2**28, side=8192):
    """Rows of what the device itself reaches: copied bytes, and products in two dtypes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    median, low, high = clock(lambda: target.copy_(source), False)
    times = {"status": gpu_report.OK, "graph": "no", "mode": "ceiling"}
    yield times | {
        "contender": "copy",
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "gb_per_s": 2 * size / median / 1e6,
    }
    for dtype, edge in ((torch.bfloat16, side), (torch.float32, side // 2)):
        left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        median, low, high = clock(lambda a=left, b=right: a @ b, False)
        yield times | {
            "contender": "matmul",
            "dtype": str(dtype).removeprefix("torch."),
            "median_ms": median,
            "p20_ms": low,
            "p80_ms": high,
            "tflops_per_s": 2 * edge**3 / median / 1e9,
        }


def case_columns(case):
    """The columns that say which case a row is of."""
    return {
        "dtype": case.dtype,
        "mode": case.mode,
        "D": case.width,
        "O": case.width,
        "tokens": case.tokens,
        "atoms": case.atoms,
        "current_atoms": case.current,
        "top_k": case.top_k,
    }


def measure_case(case, clock, quick, deadline, device, name):
    """Rows of all contenders of a case, from Python and, without a backward, as CUDA graphs."""
    data = gpu_cases.make_data(case, device)
    for contender in gpu_cases.contenders_of(case, name, quick):
        row = {"contender": contender, "graph": "no"}
        if time.monotonic() > deadline:
            yield row | {"status": "out of time"}
            continue
        if contender.startswith("triton"):
            path = contender.partition("/")[2] or case.plan(name).path
            row |= {"path": path} | model_columns(case, name, path)
        needed, free = gpu_cases.plain_bytes(case), FREE_SHARE * clock.free_bytes()
        if contender.startswith("plain") and needed > free:
            yield row | {"status": f"too large: {needed / 2**30:.1f} GiB"}
            continue
        graphs = (False,) if case.training else (False, True)
        call = gpu_cases.make_call(case, data, contender, name)
        for graph in graphs:
            yield row | measure_call(case, call, clock, graph, row)


def measure_call(case, call, clock, graph, row):
    """The columns of one timed call; what stops it becomes the row's status."""
    columns = {"graph": "yes" if graph else "no", "status": gpu_report.OK}
    try:
        call()
        if not graph:
            columns["peak_memory_mib"] = clock.memory(call)
        median, low, high = clock(call, graph)
    except torch.cuda.OutOfMemoryError:
        return columns | {"status": "out of memory"}
    except Exception as error:
        # One contender must not end the others; `conclude` lists these and fails. A call that waits
        # for the device cannot be captured, which is no failure.
        kind = "no graph" if graph else gpu_report.FAILED
        return columns | {"status": f"{kind}: {' '.join(str(error).split())}"[:200]}
    columns |= {"median_ms": median, "p20_ms": low, "p80_ms": high}
    columns["tokens_per_s"] = case.tokens / median * 1e3
    if row.get("model_ms"):
        columns["over_model"] = median / row["model_ms"]
        columns["over_bound"] = median / row["bound_ms"]
    return columns


def model_columns(case, device_name, path):
    """What the model and the lower bound say of a path, in ms."""
    model = cost.device_model(device_name)
    size, rate = (4, "single") if case.dtype == "float32" else (2, "half")
    shape = cost.Shape(
        case.tokens, case.width, case.width, case.atoms, case.current, case.top_k, size, rate,
        case.current in (0, case.atoms), case.training, True, False,
    )  # fmt: skip
    chosen = case.plan(device_name, path)
    forward, backward = roofline.our_seconds(shape, chosen, model)
    bound = baseline_model.bound(shape, model)
    if case.training:
        bound += baseline_model.backward_bound(shape, model)
    return {"model_ms": (forward + (backward or 0.0)) * 1e3, "bound_ms": bound * 1e3}


def conclude(path, tune=None):
    """Print and draw what a CSV says and write the tuned table; the exit status."""
    rows = gpu_report.read_rows(path)
    print(gpu_report.summarize(rows))
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
