"""A run of the GPU program as a whole: its order, and what is left when it ends early."""

import csv
import os
import signal
import subprocess
import sys
import time

import gpu
import gpu_agenda
import gpu_cases
import gpu_measure
import gpu_parity
import gpu_report
import pytest
from support import ROOT

H100 = "NVIDIA H100 80GB HBM3"
SETUP = {"device_name": H100, "torch": "2", "triton": "3", "moram_kernels": "abc"}
FIRST = gpu_parity.Check("resident", 300, 768, 24, "bfloat16", True)
LATER = gpu_parity.Check("decode", 17, 2048, 512, "float16", False)
CASES = [gpu_cases.Case(mode, 32, 9, 12) for mode in ("training", "prefill", "decode")]
AGENDA = gpu_agenda.Agenda(
    [FIRST],
    [gpu_agenda.Timing(CASES[0], ("plain",))],
    [LATER],
    [gpu_agenda.Timing(case, ("plain", "torch")) for case in CASES[1:]],
)


class FakeClock:
    """Answers 2 ms, but does what it is told instead at one of its calls."""

    def __init__(self, at=None, instead=None):
        self.at, self.instead, self.calls = at, instead, 0

    def __call__(self, call, graph):
        self.calls += 1
        if self.calls == self.at:
            self.instead()
        return 2.0, 1.5, 3.0

    def memory(self, call):
        return 4.0

    def free_bytes(self):
        return 2**40


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the program on a CPU with a clock and what the checks find."""

    def start(clock, found=None, *flags):
        make_data = gpu_cases.make_data
        patches = {
            gpu: {"why_not": lambda device: None, "describe": lambda device: SETUP},
            gpu_measure: {"Clock": lambda quick: clock, "ceilings": lambda *_: []},
            gpu_agenda: {"make_agenda": lambda *_: AGENDA},
            gpu_parity: {"check_parity": lambda check, device: (found or {}).get(check, [])},
            gpu_cases: {"make_data": lambda case, device: make_data(case, "cpu")},
        }
        for module, fakes in patches.items():
            for name, fake in fakes.items():
                monkeypatch.setattr(module, name, fake)
        status = gpu.main(["--out", str(tmp_path), "--workers", "0", *flags])
        rows = gpu_report.read_rows(tmp_path / "gpu.csv")
        with (tmp_path / "parity.csv").open(newline="", encoding="utf-8") as file:
            checks = list(csv.DictReader(file))
        return status, rows, checks, (tmp_path / "summary.txt").read_text(encoding="utf-8")

    return start


def test_a_run_gives_verdict_table_verdict_and_all_times(run):
    status, rows, checks, summary = run(FakeClock())
    assert status == 0
    assert [row["mode"] for row in rows] == ["training", *["prefill"] * 3, *["decode"] * 3]
    assert [check["verdict"] for check in checks] == ["agrees"] * 2
    marks = (
        "device_name: NVIDIA H100",
        "parity of the shipped paths: 1 checks, 0 problems",
        "first table\n",
        "training D32 M9 N12",
        "parity: 2 checks, 0 problems",
        "prefill D32 M9 N12",
    )
    places = [summary.index(mark) for mark in marks]
    assert places == sorted(places)


def test_a_stopped_run_keeps_its_rows_verdict_and_plots(run, tmp_path):
    # The signal that `timeout` sends, in the middle of the second case.
    clock = FakeClock(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, rows, checks, summary = run(clock)
    assert status == gpu.STOPPED == 3
    assert [(row["mode"], row["contender"], row["graph"]) for row in rows] == [
        ("training", "plain", "no"),
        ("prefill", "plain", "no"),
    ]
    assert len(checks) == 2
    assert "stopped; what was found so far follows" in summary
    assert summary.count("prefill D32 M9 N12") == 1
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_time_that_is_over_before_all_checks_is_status_3(run):
    def too_late():
        gpu_measure.Bench.left = property(lambda self: -1.0)

    left = gpu_measure.Bench.left
    try:
        status, rows, checks, summary = run(FakeClock(1, too_late))
    finally:
        gpu_measure.Bench.left = left
    assert status == 3
    assert [check["verdict"] for check in checks] == ["agrees", "out of time"]
    assert "parity: 1 checks, 0 problems, 1 not checked in time" in summary
    assert [row["status"] for row in rows] == ["ok", "out of time", "out of time"]


def test_a_path_that_disagrees_fails_but_the_others_are_timed(run, capsys):
    status, rows, checks, summary = run(FakeClock(), {FIRST: ["dx is off"]})
    assert status == 1
    assert [check["verdict"] for check in checks] == ["DISAGREES", "agrees"]
    assert checks[0]["problems"] == "dx is off"
    assert "parity: 2 checks, 1 problems" in summary
    assert len(rows) == 7
    assert "dx is off" in capsys.readouterr().err


def test_what_breaks_the_run_leaves_a_table(run, capsys):
    def broken():
        raise MemoryError("no more")

    clock = FakeClock()
    clock.free_bytes = broken
    status, rows, _, summary = run(clock)
    assert (status, rows) == (1, [])
    assert "parity of the shipped paths: 1 checks, 0 problems" in summary
    assert "MemoryError: no more" in capsys.readouterr().err


def test_a_path_that_disagrees_is_not_timed_in_that_dtype():
    case = gpu_cases.Case("training", 768, 256, 64)
    path = case.plan(H100).path
    bench = gpu_measure.Bench(FakeClock(), time.monotonic() + 60, "cpu", H100)
    bench.wrong.add((path, True, "bfloat16"))
    names = ("triton", f"triton/{path}")
    rows = list(gpu_measure.measure_case(case, names, bench))
    assert [row["status"] for row in rows] == ["not timed: disagrees"] * 2


def test_a_compilation_is_given_up_in_time():
    with pytest.raises(gpu_measure.TooLongError), gpu_measure.at_most(0.05):
        time.sleep(5)
    # The limit ends with its block.
    with gpu_measure.at_most(0.05):
        pass
    time.sleep(0.1)


def test_what_takes_too_long_to_compile_is_a_row_and_no_failure(monkeypatch):
    def never(*_):
        raise gpu_measure.TooLongError()

    monkeypatch.setattr(gpu_cases, "make_call", lambda *_: never)
    bench = gpu_measure.Bench(FakeClock(), time.monotonic() + 3600, "cpu")
    rows = list(gpu_measure.measure_case(CASES[1], (gpu_agenda.COMPILED,), bench))
    assert [row["status"] for row in rows] == ["not compiled within 45 s"]
    assert gpu_report.failures(rows) == []


def test_verdict_and_first_table_come_before_everything_else():
    agenda = gpu_agenda.make_agenda("default", H100)
    whole = gpu_parity.list_checks("default")
    assert sorted(map(str, agenda.first_checks + agenda.checks)) == sorted(map(str, whole))
    assert {check.path for check in agenda.first_checks} == {path for path, *_ in gpu_parity.SHAPES}
    assert {check.dtype for check in agenda.first_checks} == {"bfloat16", "float32"}
    assert [timing.case for timing in agenda.first_timings] == list(gpu_agenda.FIRST_CASES)
    assert agenda.items()[: len(agenda.first_checks)] == agenda.first_checks
    # Inductor's compilations come last, but for those of the first table.
    compiled = [gpu_agenda.COMPILED in timing.contenders for timing in agenda.timings]
    assert compiled == sorted(compiled)
    assert len(set(agenda.items())) == len(agenda.items())


def test_a_short_run_compiles_plain_last():
    agenda = gpu_agenda.make_agenda("quick", H100, quick=True)
    assert {timing.contenders for timing in agenda.first_timings} == {("triton", "plain")}
    assert agenda.checks == []


def test_every_contender_of_every_case_is_timed_once():
    agenda = gpu_agenda.make_agenda("default", H100)
    timed = [(t.case, name) for t in agenda.first_timings + agenda.timings for name in t.contenders]
    assert len(set(timed)) == len(timed)
    for case in gpu_cases.list_cases():
        assert {(case, name) for name in gpu_cases.contenders_of(case, H100)} <= set(timed)


def _interpreted(out):
    command = [sys.executable, ROOT / "benchmarks" / "speed" / "gpu.py", "--parity-only"]
    return subprocess.Popen(
        [*command, "--device", "cpu-interpreter", "--out", out],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_parity_runs_every_path_in_the_interpreter(tmp_path):
    process = _interpreted(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "parity: 14 checks, 0 problems" in output


def test_sigterm_ends_the_program_with_its_checks_on_disk(tmp_path):
    process = _interpreted(tmp_path)
    for line in process.stdout:
        if line.endswith("agrees\n"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 3
    lines = (tmp_path / "parity.csv").read_text(encoding="utf-8").splitlines()
    assert 2 <= len(lines) < 15
    assert "stopped; what was found" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
