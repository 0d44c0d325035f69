"""What a run says while it prepares: hidden states and decoded images, with the time left."""

import io
import sys

import pytest
import torch
from trace_support import settings_for, write_data, write_model
from xtail_support import run as run_images
from xtail_support import write_domains

from moram.harness.progress import Bar
from moram.processes import Processes
from moram.trace.run import run_trace
from moram.trace.settings import make_settings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_data(folder / "data")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    """Called in a test's own body: pytest puts its stderr back between fixtures and test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def told(monkeypatch):
    """The lines of a log that is told of each example."""
    monkeypatch.setattr("moram.harness.progress.MINUTE", 1e-9)
    return []


def cached(inputs, out, **changes):
    # Three tasks of 16 training examples; of 16 test examples each, 5 are scored.
    quick = {"first_layer": 1, "cache_prefix": True, "quiet": False, "epochs": 1, "eval_limit": 5}
    return settings_for(*inputs, out, **(quick | changes))


def last_of(terminal, name):
    """The last state of a bar."""
    return [line for line in terminal.getvalue().splitlines() if line.startswith(name)][-1]


@pytest.mark.parametrize(
    ("method", "decoding", "kept"),
    [
        ("moram", "forced", 3 * 16 + 3 * 5),
        ("moram", "generate", 3 * 16),
        ("zero-shot", "forced", 3 * 5),
    ],
)
def test_a_bar_shows_how_many_hidden_states_are_kept(
    inputs, tmp_path, monkeypatch, method, decoding, kept
):
    terminal = use_terminal(monkeypatch)
    settings = cached(inputs, tmp_path / "out", method=method, decoding=decoding)
    run_trace(settings, log=lambda line: None)
    assert f" {kept}/{kept} " in last_of(terminal, "hidden states")


def test_without_a_terminal_the_time_left_for_hidden_states_is_told(inputs, tmp_path, told):
    run_trace(cached(inputs, tmp_path / "out"), log=told.append)
    lines = [line for line in told if line.startswith("hidden states: ")]
    # 63 examples of three tasks, in batches of 4: 4 a task to train on, 2 to be scored.
    assert len(lines) == 3 * (4 + 2)
    assert lines[0].startswith("hidden states: 6 %, about ") and "100 %, about 0 " in lines[-1]
    assert all(line.endswith(" minutes to go") for line in lines)


def test_hidden_states_that_another_run_kept_are_not_counted(inputs, tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    shared = {}
    for name in ("one", "two"):
        terminal.truncate(0)
        settings = cached(inputs, tmp_path / name)
        run_trace(settings, log=lambda line: None, cached=shared)
        assert ("hidden states" in terminal.getvalue()) == (name == "one")


def test_a_quiet_run_says_nothing_of_its_hidden_states(inputs, tmp_path, monkeypatch, told):
    terminal = use_terminal(monkeypatch)
    run_trace(cached(inputs, tmp_path / "out", quiet=True), log=told.append)
    assert (terminal.getvalue(), told) == ("", [])


def test_a_bar_shows_how_many_images_are_decoded(tmp_path, monkeypatch):
    terminal = use_terminal(monkeypatch)
    data = write_domains(tmp_path / "data")
    run_images(data, tmp_path / "out", "lora", quiet=False, log=lambda line: None)
    # 9 classes of 4 test images and 3 shots.
    assert f" {9 * 7}/{9 * 7} " in last_of(terminal, "images")


def test_without_a_terminal_the_time_left_for_decoding_is_told(tmp_path, told):
    data = write_domains(tmp_path / "data")
    run_images(data, tmp_path / "out", "zero-shot", quiet=False, log=told.append)
    lines = [line for line in told if line.startswith("images: ")]
    assert len(lines) == 36 and lines[8].startswith("images: 25 %, about ")


@pytest.mark.parametrize("quiet", [True, False])
def test_only_the_first_process_has_a_bar(monkeypatch, told, quiet):
    terminal = use_terminal(monkeypatch)
    processes = Processes()
    processes.rank = 1
    settings = make_settings("small", changes=[{"data": "d", "quiet": quiet}])
    with Bar(2, "hidden states", settings, processes, told.append) as bar:
        bar.advance(2)
    assert (terminal.getvalue(), told) == ("", [])
    assert not torch.distributed.is_initialized()
