"""How `gpu.py` times a case: the clock, the device's own ceilings, one row a contender.

Which cases there are is `gpu_cases.py`, in which order `gpu_agenda.py`; what becomes of the rows
`gpu_report.py`.
"""

import contextlib
import signal
import time
from dataclasses import dataclass, field

import baseline_model
import gpu_agenda
import gpu_cases
import gpu_report
import roofline
import torch
from compile_ahead import Ahead

from moram_kernels.triton_backend import cost

# What plain is not tried at: more than this share of the memory that is free.
FREE_SHARE = 0.9
# A compilation by inductor that takes longer is given up.
COMPILE_SECONDS = 45


class TooLongError(BaseException):
    """A call took too long. No Exception, so that no handler on its way takes it for another."""


class Clock:
    """Milliseconds (median, p20, p80) of a call on the GPU, by events, with the caches flushed."""

    warm_up_ms = 10

    def __init__(self, quick=False):
        self.repeat_ms = 15 if quick else 40
        # A graph of so many calls is replayed ten times.
        self.graph_ms = self.repeat_ms / 4

    def __call__(self, call, graph):
        """Time a call; graph: as a CUDA graph, which leaves out Python and keeps the caches."""
        from triton import testing

        how = {"quantiles": (0.5, 0.2, 0.8)}
        if graph:
            return testing.do_bench_cudagraph(call, rep=self.graph_ms, **how)
        return testing.do_bench(call, warmup=self.warm_up_ms, rep=self.repeat_ms, **how)

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

    def planned_ms(self, device_ms, host_ms, graph, flush_ms):
        """How long timing a call takes, from what one call of it takes; see `triton.testing`.

        Args:
            device_ms, host_ms: of one call. graph: as for a call of this.
            flush_ms: of overwriting the cache, which is done before every call.
        """
        call_ms = max(device_ms, host_ms)
        if graph:
            # The call, do_bench's, five to estimate; capturing; ten replays.
            repeats = max(1, int(self.graph_ms / call_ms))
            return 7 * call_ms + repeats * (host_ms + 10 * device_ms)
        every_ms = max(device_ms + flush_ms, host_ms)
        # The call, the one of `memory`, do_bench's, five to estimate, warm-up, repetitions.
        warm_up = max(1, int(self.warm_up_ms / every_ms))
        repeats = max(1, int(self.repeat_ms / every_ms))
        return (3 + warm_up) * call_ms + (5 + repeats) * every_ms


@dataclass
class Bench:
    """What timing needs to know.

    clock: `Clock`. deadline: of time.monotonic. device: of torch. name: the plan's name of the GPU,
    or None. ahead: `Ahead`. wrong: (path, training, dtype) that disagree, which are not timed.
    """

    clock: Clock
    deadline: float
    device: str = "cuda"
    name: str | None = None
    ahead: Ahead = field(default_factory=lambda: Ahead([], None, 0))
    wrong: set = field(default_factory=set)

    @property
    def left(self):
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def measure_all(writer, bench, timings):
    """Write a row for every contender of the `Timing`s, until the deadline."""
    for case, contenders in timings:
        if not contenders:
            continue
        if bench.left < 0:
            writer.write(case_columns(case) | {"contender": "all", "status": "out of time"})
            continue
        print(f"{bench.left:.0f} s left: {case}: {', '.join(contenders)}", flush=True)
        for row in measure_case(case, contenders, bench):
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


def graphs_of(case, contender):
    """Whether a contender is timed from Python, and whether as a CUDA graph too.

    No backward is captured, nor the torch backend: it waits for the device, which breaks a capture
    and the allocator after it.
    """
    return (False,) if case.training or contender == "torch" else (False, True)


def measure_case(case, contenders, bench):
    """Rows of contenders of a case, from Python and, where it can be, as CUDA graphs."""
    data = gpu_cases.make_data(case, bench.device)
    for contender in contenders:
        row = {"contender": contender, "graph": "no"}
        if bench.left < 0:
            yield row | {"status": "out of time"}
            continue
        if contender.startswith("triton"):
            path = contender.partition("/")[2] or case.plan(bench.name).path
            row |= {"path": path} | model_columns(case, bench.name, path)
            if (path, case.training, case.dtype) in bench.wrong:
                yield row | {"status": "not timed: disagrees"}
                continue
            bench.ahead.wait((case, contender), bench.left)
        needed, free = gpu_cases.plain_bytes(case), FREE_SHARE * bench.clock.free_bytes()
        if contender.startswith("plain") and needed > free:
            yield row | {"status": f"too large: {needed / 2**30:.1f} GiB"}
            continue
        call = gpu_cases.make_call(case, data, contender, bench.name)
        for graph in graphs_of(case, contender):
            with bench.ahead.quiet():
                columns = measure_call(case, call, bench, graph, row)
            yield row | columns
            if columns["status"] != gpu_report.OK:
                break


def measure_call(case, call, bench, graph, row):
    """The columns of one timed call; what stops it becomes the row's status."""
    columns = {"graph": "yes" if graph else "no", "status": gpu_report.OK}
    compiles = row["contender"] == gpu_agenda.COMPILED
    seconds = max(1, min(COMPILE_SECONDS, bench.left)) if compiles else 0
    try:
        with at_most(seconds):
            call()
        if not graph:
            columns["peak_memory_mib"] = bench.clock.memory(call)
        median, low, high = bench.clock(call, graph)
    except torch.cuda.OutOfMemoryError:
        return columns | {"status": "out of memory"}
    except TooLongError:
        return columns | {"status": f"not compiled within {seconds:.0f} s"}
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


@contextlib.contextmanager
def at_most(seconds):
    """Raise `TooLongError` in this block once so many seconds are over; 0 is no limit."""

    def stop(*_):
        raise TooLongError()

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shape_of(case):
    """The case as the cost model's `Shape`."""
    size, rate = (4, "single") if case.dtype == "float32" else (2, "half")
    return cost.Shape(
        case.tokens, case.width, case.width, case.atoms, case.current, case.top_k, size, rate,
        case.current in (0, case.atoms), case.training,
    )  # fmt: skip


def model_columns(case, device_name, path):
    """What the model and the lower bound say of a path, in ms."""
    model, shape = cost.device_model(device_name), shape_of(case)
    forward, backward = roofline.our_seconds(shape, case.plan(device_name, path), model)
    bound = baseline_model.bound(shape, model)
    if case.training:
        bound += baseline_model.backward_bound(shape, model)
    return {"model_ms": (forward + (backward or 0.0)) * 1e3, "bound_ms": bound * 1e3}
