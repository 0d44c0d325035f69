"""The benchmark program runs, writes what it says, and refuses to time a wrong backend."""

import csv
import subprocess
import sys

import pytest
import torch
from support import ROOT

SIZES = ["--atoms", "3,24", "--tokens", "1,70", "--widths", "48", "--top-k", "4"]
TINY = [*SIZES, "--threads", "1", "--repeats", "5"]


@pytest.fixture
def modules(monkeypatch):
    """The modules throughput and measure, found as the program finds them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "speed"))
    import measure
    import throughput

    threads = torch.get_num_threads()
    yield throughput, measure
    torch.set_num_threads(threads)


def _paths(folder):
    return folder / "rows.csv", folder / "new" / "plot.png"


def test_program_writes_csv_and_plot(tmp_path):
    out, plot = _paths(tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "speed" / "throughput.py", *TINY]
    command += ["--out", out, "--plot", plot, "--backends", "plain,reference,torch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Two modes, two token counts, two atom counts; base and three backends.
    assert len(rows) == 2 * 2 * 2 * 4
    assert {row["backend"] for row in rows} == {"base", "plain", "reference", "torch"}
    for row in rows:
        assert not [name for name, value in row.items() if value == ""]
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        low, mid, high = (float(row[f"ratio_to_plain{end}"]) for end in ("_p20", "", "_p80"))
        assert 0 < low <= mid <= high
        tokens_per_s = int(row["tokens"]) / float(row["median_ms"]) * 1e3
        assert float(row["tokens_per_s"]) == pytest.approx(tokens_per_s, rel=1e-3)
        assert row["current_atoms"] == ("3" if row["atoms"] == "3" else "8")
        assert (int(row["saved_bytes"]) > 0) == (row["mode"] == "training")
    assert done.stdout.count("\n") == 1 + 8 + 1


@pytest.mark.parametrize("wrong_part", ["value", "gradient", "nan"])
@pytest.mark.parametrize("tokens", ["1", "70"])
def test_wrong_backend_is_named_and_not_timed(
    modules, monkeypatch, tmp_path, capsys, wrong_part, tokens
):
    throughput, measure = modules
    retrieve = measure.retrieve

    def wrong(x, *args, backend, **kwargs):
        output = retrieve(x, *args, backend=backend, **kwargs)
        if backend == "torch" and wrong_part == "value":
            return output * 1.001
        if backend == "torch" and wrong_part == "nan":
            return output * float("nan")
        if backend == "torch" and output.requires_grad:
            return output + (x - x.detach()).sum(-1, keepdim=True)
        return output

    monkeypatch.setattr(measure, "retrieve", wrong)
    out, plot = _paths(tmp_path)
    flags = [*TINY, "--backends", "plain,reference,torch", "--tokens", tokens]
    assert throughput.main([*flags, "--modes", "training", "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert 'backend "torch" disagrees' in message
    assert ("dx is off" if wrong_part == "gradient" else "output is off") in message
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1
    assert not plot.exists()


def test_every_dtype_agrees_on_one_clear_token(modules):
    _, measure = modules
    for dtype in measure.ROUNDINGS:
        case = measure.Case("training", width=64, tokens=1, atoms=64, top_k=4, dtype=dtype)
        results = measure.measure_case(case, ["plain", "torch"], repeats=1, seconds=1)
        assert [len(result.samples_ms) for result in results.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--atoms 8,x", "must be an integer >= 1, got 'x'"),
        ("--tokens 0", "must be an integer >= 1, got '0'"),
        ("--backends torch", "must include plain"),
        ("--backends plain,fast", "got 'fast'"),
        ("--modes training,testing", "got 'testing'"),
        ("--case-seconds 0", "--case-seconds must be > 0"),
        ("--plot out/plot.jpg", "--plot must end in .png"),
        ("--plot-only missing.csv", "--plot-only must name a CSV file"),
    ],
)
def test_bad_flag_is_named(modules, capsys, flags, words):
    throughput, _ = modules
    with pytest.raises(SystemExit) as stop:
        throughput.parse_args(flags.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_plot_of_another_csv_names_missing_columns(modules, tmp_path):
    throughput, _ = modules
    path = tmp_path / "other.csv"
    path.write_text("backend,tokens\nplain,1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lacks the columns.*median_ms"):
        throughput.read_csv(path)
