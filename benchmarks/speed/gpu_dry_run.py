"""How long `gpu.py` should take on a GPU machine, without one: everything but the device's work.

Counted and measured here, in one process: every kernel that a run needs, compiled anew for the GPU,
and the drawing of the checks' inputs. Seconds are those of the CPU, so that other programs on this
machine do not count. Planned: the warm-up and repetitions of the clock on modelled times. Assumed:
the constants below. From these a schedule of so many processes is made.
"""

import csv
import heapq
import tempfile
import time
from itertools import accumulate

import baseline_model
import gpu_agenda
import gpu_cases
import gpu_measure
import gpu_parity
from compile_ahead import Ahead
from compile_worker import Machine

from moram_kernels.triton_backend import cost
from moram_kernels.triton_backend.devices import device_model

PROCESSES = 16
# Seconds until the device answers, of the ceilings, of a check's work on the device and of its
# float64 reference, until a case is drawn, and until a compiled kernel is read and loaded.
START, CEILINGS, CHECK, DATA, LOAD = 10.0, 3.0, 0.5, 0.2, 0.1
# Inductor's compilation of plain; a captured graph; the plots at the end.
INDUCTOR, CAPTURE, PLOTS = 20.0, 0.3, 6.0
# Bytes that are overwritten before each timed call, and that plain may take.
FLUSHED, MEMORY = 2**28, 80e9
DEVICES = {
    name: Machine(
        device_model(name), ("cuda", arch, 32), {"max_shared_mem": device_model(name).shared}
    )
    for name, arch in (("A100", 80), ("H100", 90), ("H200", 90))
}


def run(device, agenda, quick, seconds, out):
    """Compile what a run needs, write compile_seconds.csv and print the schedule; status 0.

    What compile_seconds.csv has already, from a dry run that was stopped, is not compiled again.

    Args:
        device: of `DEVICES`. agenda: `gpu_agenda.Agenda`. quick, seconds: flags of `gpu.py`.
        out: folder.
    """
    machine, items, path = DEVICES[device], agenda.items(), out / "compile_seconds.csv"
    out.mkdir(parents=True, exist_ok=True)
    known = _read(path) if path.is_file() else []
    with (
        tempfile.TemporaryDirectory() as cache,
        Ahead(items, machine, 1, {"TRITON_CACHE_DIR": cache}, known) as ahead,
    ):
        drawn = {}
        for check in (*agenda.first_checks, *agenda.checks):
            start = time.process_time()
            gpu_parity.draw(check, "cpu")
            drawn[check] = time.process_time() - start
        while not ahead.wait_all(60):
            print(f"{len(ahead.kernels)} kernels compiled", flush=True)
            _write(path, ahead.kernels)
    kernels = _write(path, ahead.kernels)
    times = [kernel["cpu_seconds"] for kernel in kernels]
    print(
        f"{len(times)} kernels, {sum(times):.0f} s of CPU in one process, up to {max(times):.1f} s"
    )
    print(*ahead.problems, sep="\n")
    print(
        f"assumed seconds: {START:g} until the device answers, {CHECK:g} a check and {DATA:g} a "
        f"case on it, {LOAD:g} to load a kernel, {INDUCTOR:g} for each of inductor's compilations, "
        f"{CAPTURE:g} to capture a graph"
    )
    for processes in (1, PROCESSES):
        ready = ready_seconds(items, ahead.needs, kernels, processes, max(ahead.starts))
        print(f"\nwith {processes} at a time: compiled after {max(ready.values()):.0f} s")
        clock = gpu_measure.Clock(quick)
        for text, after in schedule(agenda, machine, clock, ready, ahead.needs, drawn, seconds):
            print(f"{after:5.0f} s  {text}")
    return 0


def _read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [row | {"cpu_seconds": float(row["cpu_seconds"])} for row in csv.DictReader(file)]


def _write(path, kernels):
    rows = list(kernels.values())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("kernel", "name", "new", "seconds", "cpu_seconds"))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def ready_seconds(items, needs, kernels, processes, start):
    """{item: seconds until it and all items before it are compiled}.

    Args:
        needs: {index of an item: labels of kernels}, as one worker reports them.
        kernels: messages of `compile_ahead`, in the order in which they are claimed.
        processes: workers. start: seconds until a worker begins.
    """
    free, done = [start] * processes, {}
    for kernel in kernels:
        done[kernel["kernel"]] = heapq.heappop(free) + kernel["cpu_seconds"]
        heapq.heappush(free, done[kernel["kernel"]])
    latest = (max((done[k] for k in needs[i]), default=start) for i in range(len(items)))
    return dict(zip(items, accumulate(latest, max), strict=True))


def schedule(agenda, machine, clock, ready, needs, drawn, seconds):
    """(what is done, seconds after the start) at every stage of a run."""
    loads, seen = {}, set()
    for i, item in enumerate(ready):
        loads[item] = LOAD * len(needs[i] - seen)
        seen |= needs[i]

    def check(now, checks):
        for one in checks:
            now = max(now, ready[one]) + drawn[one] + CHECK + loads[one]
        return now

    def measure(now, timings):
        for case, contenders in timings:
            if now > seconds:
                break
            now += DATA
            for name in contenders:
                if (case, name) in ready:
                    now = max(now, ready[case, name]) + loads[case, name]
                now += timing_seconds(case, name, machine.device, clock)
        return now

    compiled = [timing for timing in agenda.timings if gpu_agenda.COMPILED in timing.contenders]
    others = [timing for timing in agenda.timings if timing not in compiled]
    now = START + CEILINGS * bool(agenda.first_timings)
    yield "the device's ceilings", now
    yield (
        f"verdict on the shipped paths, {len(agenda.first_checks)} checks",
        (now := check(now, agenda.first_checks)),
    )
    yield (
        f"first table, {len(agenda.first_timings)} cases",
        (now := measure(now, agenda.first_timings)),
    )
    yield f"verdict on {len(agenda.checks)} more checks", (now := check(now, agenda.checks))
    yield f"times of {len(others)} cases", (now := measure(now, others))
    yield f"times of plain compiled, {len(compiled)} cases", (now := measure(now, compiled))
    yield "plots", now + PLOTS


def timing_seconds(case, contender, name, clock):
    """Planned seconds of timing a contender, from Python and as a graph."""
    model, shape = cost.device_model(name), gpu_measure.shape_of(case)
    flush = 1e3 * FLUSHED / model.memory
    if contender.startswith("plain") and gpu_cases.plain_bytes(case) > MEMORY:
        return 0.0
    if contender.startswith("triton"):
        path = contender.partition("/")[2] or case.plan(name).path
        device = gpu_measure.model_columns(case, name, path)["model_ms"]
        host = baseline_model.our_host(shape, path)
        host += baseline_model.our_backward_host() * case.training
    else:
        passes = baseline_model.record_plain(shape, model)
        costs = [baseline_model.plain_cost(ops) for ops in passes]
        if contender == gpu_agenda.COMPILED:
            costs = [
                baseline_model.compiled_cost(shape, model, ops, is_backward)
                for is_backward, ops in enumerate(passes[: 1 + case.training])
            ]
        device, host = 1e3 * sum(c.device for c in costs), sum(c.host for c in costs)
    total = INDUCTOR if contender == gpu_agenda.COMPILED else 0.0
    for graph in gpu_measure.graphs_of(case, contender):
        total += CAPTURE * graph + clock.planned_ms(device, 1e3 * host, graph, flush) / 1e3
    return total
