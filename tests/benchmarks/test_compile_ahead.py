"""Kernels compiled ahead: a real launch finds them in Triton's cache, and nobody waits in vain."""

import base64
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import compile_ahead
import compile_worker
import gpu_agenda
import gpu_cases
import gpu_dry_run
import gpu_measure
import gpu_parity
import pytest
from support import ROOT

from moram_kernels import fused_ops
from moram_kernels.aliases import Bank

H100 = gpu_dry_run.DEVICES["H100"]
# Both kinds of items; with and without the vendor's products, in slices and whole.
ITEMS = [
    gpu_parity.Check("split-dense", 9, 64, 40, "float16", True, 4),
    (gpu_cases.Case("decode", 512, 3, 40), "triton"),
    (gpu_cases.Case("prefill", 48, 20, 40), "triton"),
]
NO_PATH = gpu_parity.Check("resident", 9, 64, 4000, "bfloat16", False)
# The same calls on tensors that were drawn, in memory of their own; says what Triton compiled.
LAUNCH = """
import base64, json, pickle, sys
import compile_worker, gpu_cases, gpu_parity, triton

hits, launched = [], []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
machine, items = pickle.loads(base64.b64decode(sys.argv[1]))
with compile_worker.pretend(machine, launched.append):
    for item in items:
        if isinstance(item, gpu_parity.Check):
            args = (*gpu_parity.draw(item, "cpu"), item.path, machine.device)
            gpu_cases.run_path(*args, gpu_parity.settings_of(item))
        else:
            case, contender = item
            data = gpu_cases.make_data(case, "cpu")
            gpu_cases.make_call(case, data, contender, machine.device)()
print(json.dumps([hits, launched]))
"""


def test_a_launch_compiles_nothing_that_workers_compiled_ahead(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    with compile_ahead.Ahead([NO_PATH, *ITEMS], H100, 2, environment) as ahead:
        assert all(ahead.wait(item, 600) for item in [NO_PATH, *ITEMS])
        assert ahead.wait_all(60)
    assert len(ahead.problems) == 2 and "path 'resident' does not cover" in ahead.problems[0]
    assert all(kernel["new"] for kernel in ahead.kernels.values())
    # Each was compiled by one worker.
    assert len(list(tmp_path.glob("*/*.cubin"))) == len(ahead.kernels)
    order = base64.b64encode(pickle.dumps((H100, ITEMS))).decode()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, order],
        env=environment | {"PYTHONPATH": str(ROOT / "benchmarks" / "speed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    hits, launched = json.loads(done.stdout)
    assert hits == [True] * len(ahead.kernels)
    assert {"_score_kernel", "_aggregate_kernel", "_decode_kernel"} < set(launched)


def test_workers_cannot_see_a_gpu_and_end_with_the_program(monkeypatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command, **how):
            started.append((self, how["env"]))
            # Instead of a worker, one that never says anything.
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **how)

    monkeypatch.setattr(compile_ahead.subprocess, "Popen", Process)
    with compile_ahead.Ahead(ITEMS, H100, 2) as ahead:
        assert not ahead.wait(ITEMS[0], 0.05)
        with ahead.quiet():
            pass
    assert len(started) == 2
    for process, environment in started:
        assert environment["CUDA_VISIBLE_DEVICES"] == environment["HIP_VISIBLE_DEVICES"] == ""
        assert process.returncode == -signal.SIGKILL


def test_nobody_waits_for_workers_that_died(monkeypatch):
    monkeypatch.setattr(compile_ahead, "WORKER", ROOT / "no-such-file.py")
    with compile_ahead.Ahead(ITEMS, H100, 2) as ahead:
        assert ahead.wait_all(60)
        assert ahead.wait(ITEMS[0], 0)
    assert compile_ahead.Ahead(ITEMS, None, 0).wait(ITEMS[0], 0)


def test_an_item_is_ready_once_all_kernels_it_needs_are():
    ahead = compile_ahead.Ahead(ITEMS, H100, 0)
    ahead.finished = False
    assert not ahead.is_ready(ITEMS[1])
    ahead._note({"item": 1, "needs": ["a", "b"]})
    ahead._note({"kernel": "a", "seconds": 1.0})
    assert not ahead.is_ready(ITEMS[1])
    ahead._note({"kernel": "b", "seconds": 1.0})
    assert ahead.is_ready(ITEMS[1]) and not ahead.is_ready(ITEMS[0])
    # Another worker compiled both itself, and so needs nobody.
    ahead._note({"item": 0, "needs": []})
    assert ahead.is_ready(ITEMS[0])


def test_a_kernel_is_claimed_once(tmp_path):
    order = compile_worker.Order(H100, ITEMS, tmp_path, 0, 0.0)
    first, second = (compile_worker.Worker(order, lambda message: None) for _ in range(2))
    how = {"fn": SimpleNamespace(module="m", name="_k"), "repr": ""}
    assert first.before_compiling(key="a", **how) is False
    assert second.before_compiling(key="a", **how) is True
    assert second.before_compiling(key="b", **how) is False
    assert second.needs == first.needs | second.needs and len(second.needs) == 2


def test_the_library_plans_as_it_does_on_the_machine():
    case = gpu_cases.Case("training", 768, 300, 160)
    data, settings = gpu_cases.blank_data(case), (case.top_k, 0.03, 0.2, 1e-12)
    machine = gpu_dry_run.DEVICES["A100"]
    with compile_worker.pretend(machine, print):
        found = fused_ops.plan_for(data.x, Bank(*data[1:5]), settings, True, "ieee")
    assert found == case.plan(machine.device) != case.plan("interpreter")
    # And as here again afterwards.
    again = fused_ops.plan_for(data.x, Bank(*data[1:5]), settings, True, "ieee")
    assert again == case.plan("interpreter")


def test_workers_compile_for_the_machine_that_the_driver_knows():
    with compile_worker.pretend(H100, print):
        machine = compile_ahead.this_machine()
    assert machine[:3] == H100[:3]
    assert machine.launcher == ("compile_worker", "launcher_cls")


def _kernels(*seconds):
    return [{"kernel": str(i), "cpu_seconds": s} for i, s in enumerate(seconds)]


def test_schedule_gives_each_kernel_to_the_first_free_process():
    needs = {0: ["0", "1"], 1: ["3"], 2: []}
    # Two processes from second 1: 4 s and 2 s, then 5 s after the second, 1 s after the first.
    ready = gpu_dry_run.ready_seconds(ITEMS, needs, _kernels(4, 2, 5, 1), 2, 1.0)
    assert list(ready.values()) == [5.0, 6.0, 6.0]
    ready = gpu_dry_run.ready_seconds(ITEMS, needs, _kernels(4, 2, 5, 1), 1, 1.0)
    assert list(ready.values()) == [7.0, 13.0, 13.0]


@pytest.mark.parametrize("graph", [False, True])
def test_planned_time_counts_the_calls_that_the_clock_makes(graph, monkeypatch):
    from triton import testing

    clock, count = gpu_measure.Clock(), itertools.count()
    # A call of 2 ms on the device and as long on the host, without a cache to overwrite.
    planned = clock.planned_ms(2.0, 2.0, graph, 0.0)
    if graph:
        # Seven calls, five captured (10 ms), fifty replayed.
        assert planned == 7 * 2 + 5 * 2 + 50 * 2
    else:
        # The call, that of `memory`, do_bench's, five to estimate, five and twenty.
        assert planned == (1 + 1 + 1 + 5 + 5 + 20) * 2
        asked = {}
        monkeypatch.setattr(testing, "do_bench", lambda call, **how: asked.update(how))
        clock(lambda: next(count), False)
        assert (asked["warmup"], asked["rep"]) == (10, 40)


def test_dry_run_says_when_each_stage_ends_and_goes_on_where_it_was_stopped(
    monkeypatch, tmp_path, capsys
):
    known = []

    class Ahead:
        def __init__(self, items, machine, workers, environment, before):
            known.append([kernel["kernel"] for kernel in before])
            made = {"name": "_k", "new": True, "seconds": 9.0, "cpu_seconds": 8.0}
            self.kernels = {label: {"kernel": label, **made} for label in "ab"}
            self.needs, self.starts, self.problems = {0: {"a"}, 1: {"b"}}, [4.0], []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_all(self, patience):
            return True

    monkeypatch.setattr(gpu_dry_run, "Ahead", Ahead)
    monkeypatch.setattr(gpu_parity, "draw", lambda check, device: None)
    monkeypatch.setattr(gpu_dry_run, "timing_seconds", lambda *_: 30.0)
    timing = gpu_agenda.Timing(ITEMS[1][0], ("triton", "plain"))
    last = gpu_agenda.Timing(ITEMS[1][0], (gpu_agenda.COMPILED,))
    agenda = gpu_agenda.Agenda([ITEMS[0]], [timing], [], [last])
    for _ in range(2):
        assert gpu_dry_run.run("H100", agenda, False, 500, tmp_path) == 0
    assert known == [[], ["a", "b"]]
    text = capsys.readouterr().out
    assert text.startswith("2 kernels, 16 s of CPU in one process, up to 8.0 s")
    # One process is ready at 4 + 8 and 4 + 16 s, many are at 4 + 8.
    assert "with 1 at a time: compiled after 20 s" in text
    assert "with 16 at a time: compiled after 12 s" in text
    # Answer and ceilings 13, the check and its kernel 0.6, the case 0.2 and its kernel 0.1, 2 x 30.
    expected = {
        "ceilings": 13,
        "shipped paths": 14,
        "first table": 74,
        "compiled": 104,
        "plots": 110,
    }
    for line, seconds in expected.items():
        (found,) = [
            x for x in text.rpartition("with 16")[2].splitlines() if line in x and " s  " in x
        ]
        assert found.split()[0] == str(seconds), found
