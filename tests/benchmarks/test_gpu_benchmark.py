"""The GPU program, but for the clock: what it runs, what it writes, when it refuses and fails."""

import itertools
import time

import gpu
import gpu_cases
import gpu_measure
import gpu_parity
import gpu_report
import pytest
import torch

from moram_kernels.triton_backend.plan import plan

H100 = "NVIDIA H100 80GB HBM3"
SETUP = {"device_name": H100, "torch": "2", "triton": "3", "moram_kernels": "abc", "command": "x"}


class FakeClock:
    """Runs the call once and answers 2 ms; calls a contender's own way of failing in a graph."""

    def __init__(self, free=2**40):
        self.free = free

    def __call__(self, call, graph):
        call()
        if graph:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return 2.0, 1.5, 3.0

    def memory(self, call):
        call()
        return 4.0

    def free_bytes(self):
        return self.free


def _bench(clock, deadline=None, name=None):
    deadline = time.monotonic() + 60 if deadline is None else deadline
    return gpu_measure.Bench(clock, deadline, "cpu", name)


def _measure(path, clock, cases, deadline=None):
    timings = [(case, tuple(gpu_cases.contenders_of(case, None))) for case in cases]
    with gpu_report.Writer(path, SETUP) as writer:
        gpu_measure.measure_all(writer, _bench(clock, deadline), timings)
    return gpu_report.read_rows(path)


def _row(contender, median, spread=0.0, **columns):
    row = dict.fromkeys(gpu_report.COLUMNS, "")
    row |= {"mode": "prefill", "D": 768, "O": 768, "tokens": 4096, "atoms": 64, "top_k": 8}
    row |= {"dtype": "bfloat16", "graph": "no", "status": "ok", "path": "resident"}
    row |= {"contender": contender, "median_ms": median, "device_name": H100}
    row |= {"p20_ms": median - spread, "p80_ms": median + spread, "over_bound": None}
    return row | columns


def test_without_a_gpu_one_sentence_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gpu.py: torch sees no CUDA device; run this on a machine with")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--plot-only none.csv", "--plot-only must name a CSV file"),
        ("--seconds 0", "--seconds must be > 0"),
        ("--workers -1", "--workers must be >= 0, got -1"),
        ("--device cpu-interpreter", "has no times; add --parity-only"),
    ],
)
def test_bad_flag_is_named(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        gpu.main(flags.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_cases_span_atoms_layers_and_modes():
    cases = gpu_cases.list_cases()
    assert {c.atoms for c in cases} >= {8, 64, 65536}
    assert {c.width for c in cases} == {768, 4096}
    assert {c.mode for c in cases} == {"prefill", "training", "decode"}
    assert len(set(cases)) == len(cases)
    assert set(gpu_cases.list_cases(quick=True)) < set(cases)


def test_every_path_is_timed_beside_the_plans_choice():
    seen = set()
    for case in gpu_cases.list_cases():
        names = gpu_cases.contenders_of(case, H100)
        assert {"plain", "torch", "triton"} < set(names)
        paths = gpu_cases.paths_of(case, H100)
        assert paths[0] == case.plan(H100).path
        seen.update(paths)
    assert seen == {"resident", "decode", "split-dense", "split-gather"}
    assert gpu_cases.contenders_of(gpu_cases.Case("decode", 4096, 1, 8), None) == ["plain", "torch"]


def test_rows_of_every_contender_reach_the_csv(tmp_path):
    cases = [gpu_cases.Case(mode, 32, 9, 12) for mode in ("prefill", "training")]
    rows = _measure(tmp_path / "new" / "gpu.csv", FakeClock(), cases)
    timed = [row for row in rows if row["status"] == "ok"]
    assert [(r["mode"], r["contender"]) for r in timed] == list(
        itertools.product(("prefill", "training"), ("plain", "torch"))
    )
    for row in timed:
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"]) == (2.0, 1.5, 3.0)
        assert row["tokens_per_s"] == 9 / 2e-3
        assert row["peak_memory_mib"] == 4.0
        assert row["device_name"] == H100 and row["command"] == "x"
    # The torch backend waits for the device, so it is never captured.
    graphs = [(row["contender"], row["status"]) for row in rows if row["graph"] == "yes"]
    assert graphs == [("plain", "no graph: operation not permitted when stream is capturing")]


def test_ceilings_are_rates_of_copied_bytes_and_products():
    rows = list(gpu_measure.ceilings(FakeClock(), "cpu", 2**10, 16))
    assert [row["contender"] for row in rows] == ["copy", "matmul", "matmul"]
    assert rows[0]["gb_per_s"] == pytest.approx(2 * 2**10 / 2e-3 / 1e9)
    assert rows[1]["tflops_per_s"] == pytest.approx(2 * 16**3 / 2e-3 / 1e12)


def test_plain_that_does_not_fit_is_a_row_and_not_run(tmp_path):
    cases = [gpu_cases.Case("training", 32, 9, 12)]
    rows = _measure(tmp_path / "gpu.csv", FakeClock(free=1000), cases)
    assert [row["contender"] for row in rows] == ["plain", "torch"]
    assert rows[0]["status"].startswith("too large: ") and rows[0]["median_ms"] is None
    assert rows[1]["status"] == "ok"
    # Plain at 65536 atoms keeps tens of GiB for its backward.
    assert gpu_cases.plain_bytes(gpu_cases.Case("training", 768, 12608, 65536)) > 20 * 2**30


def test_cases_after_the_deadline_are_named(tmp_path):
    cases = [gpu_cases.Case("prefill", 32, 9, 12)]
    rows = _measure(tmp_path / "gpu.csv", FakeClock(), cases, deadline=0.0)
    assert [(row["atoms"], row["status"]) for row in rows] == [(12, "out of time")]


def test_what_raises_is_listed_and_fails(tmp_path, capsys, monkeypatch):
    def broken(case, data, name, device_name):
        def call():
            raise ValueError("no such\nluck") if name == "torch" else torch.OutOfMemoryError()

        return call

    monkeypatch.setattr(gpu_cases, "make_call", broken)
    path = tmp_path / "gpu.csv"
    rows = _measure(path, FakeClock(), [gpu_cases.Case("training", 32, 9, 12)])
    assert [row["status"] for row in rows] == ["out of memory", "failed: no such luck"]
    assert gpu.conclude(path) == 1
    message = capsys.readouterr().err
    assert "torch, training, 9 tokens, 32 -> 32, 12 atoms: failed: no such luck" in message


def test_only_slower_beyond_noise_is_slow():
    ours = _row("triton", 2.0, 0.1)
    assert gpu_report.slow_paths([ours, _row("plain", 1.85, 0.1), _row("torch", 3.0)]) == []
    (sentence,) = gpu_report.slow_paths([ours, _row("plain", 1.5, 0.1), _row("torch", 3.0)])
    assert "triton (resident) 2 ms, plain 1.5 ms" in sentence
    # Another case, or a graph, is no comparison.
    others = [_row("plain", 1.0, atoms=8), _row("torch", 1.0, graph="yes")]
    assert gpu_report.slow_paths([ours, *others]) == []


def test_fastest_path_becomes_the_plans_path():
    paths = {"triton/resident": 2.0, "triton/split-dense": 1.5, "triton/split-gather": 3.0}
    rows = [_row(name, median) for name, median in paths.items()]
    table = gpu_report.tuned_table(rows, gpu.plan_key, lambda row: "resident")
    chosen = plan(
        4096, 768, 768, 64, 8, "bfloat16", device=H100, current=0, joined=True, table=table
    )
    assert (chosen.path, chosen.reason) == ("split-dense", "measured on this device")
    # Within 5 percent the plan keeps its own.
    close = [_row("triton/resident", 1.55), _row("triton/split-dense", 1.5)]
    table = gpu_report.tuned_table(close, gpu.plan_key, lambda row: "resident")
    assert table == {H100: {"paths": {}, "tiles": {}}}


def test_model_and_bound_stand_beside_a_path():
    for mode in ("prefill", "training"):
        case = gpu_cases.Case(mode, 4096, 4096, 64)
        for path in gpu_cases.paths_of(case, H100):
            columns = gpu_measure.model_columns(case, H100, path)
            assert 0 < columns["bound_ms"] < columns["model_ms"] < 10


def test_time_is_compared_with_the_model_and_the_bound(monkeypatch):
    monkeypatch.setattr(gpu_cases, "make_call", lambda *_: lambda: None)
    case = gpu_cases.Case("training", 768, 256, 64)
    names = gpu_cases.contenders_of(case, H100, quick=True)
    bench = _bench(FakeClock(), name=H100)
    rows = {row["contender"]: row for row in gpu_measure.measure_case(case, names, bench)}
    assert rows["triton"]["path"] == case.plan(H100).path
    assert {f"triton/{path}" for path in gpu_cases.paths_of(case, H100)} < set(rows)
    for name, row in rows.items():
        assert ("over_model" in row) == name.startswith("triton")
    row = rows["triton"]
    assert row["over_model"] == pytest.approx(2.0 / row["model_ms"])
    assert row["over_bound"] == pytest.approx(2.0 / row["bound_ms"])


def test_summary_shows_ceilings_and_ratios():
    copy = _row("copy", 1.0, mode="ceiling", gb_per_s=2500.0, tflops_per_s=None)
    ours = _row("triton", 2.0, over_model=1.5, over_bound=2.25)
    text = gpu_report.summarize([copy, ours, _row("plain", 5.0, over_model=None)])
    first, head, line = text.split("\n")
    assert first == "copy bfloat16: 2500 GB/s"
    assert head.split()[-3:] == ["plain/triton", "triton/model", "triton/bound"]
    assert line.split()[-3:] == ["2.50", "1.50", "2.25"]


def test_plots_come_from_the_csv_alone(tmp_path, capsys):
    path = tmp_path / "gpu.csv"
    with gpu_report.Writer(path, SETUP) as writer:
        for name, graph, mode in itertools.product(
            gpu_report.STYLES, ("no", "yes"), ("prefill", "training", "decode")
        ):
            for atoms in (8, 512):
                extra = {"tokens_per_s": 1e5, "peak_memory_mib": 3.0}
                writer.write(_row(name, 1.0, 0.1, atoms=atoms, graph=graph, mode=mode, **extra))
    assert gpu.main(["--plot-only", str(path)]) == 0
    for name in ("throughput", "decode", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert gpu.conclude(path) == 0
    assert "plain/triton" in capsys.readouterr().out
    path.write_text("mode,D\nprefill,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the columns.*median_ms"):
        gpu_report.read_rows(path)


def test_parity_names_a_wrong_and_an_unsteady_path(monkeypatch):
    check = gpu_parity.Check("split-dense", 9, 32, 24, "float32", True)
    fault, runs = {}, []

    def run_path(case, data, *_):
        runs.append(None)
        output, dx, dkeys, dvalues = gpu_parity._torch_backend(case, data)
        dvalues = dvalues + fault.get("unsteady", 0.0) * len(runs)
        return output, dx * fault.get("dx", 1), dkeys * fault.get("dkeys", 1), dvalues

    monkeypatch.setattr(gpu_cases, "run_path", run_path)
    assert gpu_parity.check_parity(check, "cpu") == []
    fault = {"dkeys": 1 + 1e-4}
    assert "dcurrent_keys max error" in gpu_parity.check_parity(check, "cpu")[0]
    fault = {"dx": float("nan")}
    assert any("dx max error" in s for s in gpu_parity.check_parity(check, "cpu"))
    fault = {"unsteady": 1e-7}
    sentences = gpu_parity.check_parity(check, "cpu")
    assert sentences == [f"{check}: dcurrent_values differs between two runs"]


def test_parity_covers_every_path_mode_and_dtype():
    checks = gpu_parity.list_checks()
    assert {c.dtype for c in checks} == {"float32", "bfloat16", "float16", "mixed"}
    for path in ("resident", "split-dense", "split-gather"):
        assert {c.training for c in checks if c.path == path} == {False, True}
    assert any(c.path == "decode" for c in checks)
    assert any(c.atoms > 8192 and c.training for c in checks)
    quick, default = gpu_parity.list_checks("quick"), gpu_parity.list_checks("default")
    assert set(quick) < set(default) < set(checks)
    assert {c.path for c in quick} == {c.path for c in checks}
    # No check asks for a path that the plan would refuse.
    for check in checks:
        case = gpu_parity.case_of(check)
        assert case.plan(H100, check.path).path == check.path
