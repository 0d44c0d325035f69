"""The command `moram` itself: its help, its version. What its words do is tested with them."""

import argparse
import re
import subprocess
import sys

import pytest
from support import ROOT

import moram
from moram.cli import COMMANDS, main

# What takes long to import: each alone is slower than all of argparse.
HEAVY = ("torch", "numpy", "triton", "transformers", "open_clip", "PIL", "yaml", "safetensors")
CODE = """
import sys
from moram.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print([name for name in HEAVY if name in sys.modules])
"""
LINES = [[], ["trace", "check-data"], ["xtail", "check-data"]]
LINES += [[name] for name in COMMANDS]


@pytest.mark.parametrize(
    "words", [*([*line, "--help"] for line in LINES), ["--version"]], ids=" ".join
)
def test_help_imports_nothing_heavy(words):
    command = [sys.executable, "-c", CODE.replace("HEAVY", repr(HEAVY)), *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *said, loaded = run.stdout.splitlines()
    assert said and loaded == "[]"


def printed(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert not end.value.code
    return capsys.readouterr().out


def test_version_is_that_of_the_library(capsys):
    assert printed(capsys, "--version") == f"moram {moram.__version__}\n"


def test_help_lists_every_command_with_what_it_does(capsys):
    said = " ".join(printed(capsys, "--help").split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_its_arguments_are(capsys, name):
    assert printed(capsys, name, "--help").startswith(f"usage: moram {name} [-h]")
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    arguments = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    assert [a.dest for a in arguments if not a.help] == [] and len(arguments) > 1


def test_the_methods_that_help_offers_are_those_that_fit(capsys):
    texts = [printed(capsys, command, "--help") for command in ("trace", "xtail")]
    trace, xtail = (re.split(r"[\s,]+", text) for text in texts)
    for method, in_trace, in_xtail in (
        ("moram", True, True),
        ("rail-primal", False, True),
        ("moe-adapters", False, True),
        ("task-lora", True, False),
        ("in-context", True, False),
        ("zero-shot", True, True),
    ):
        assert (method in trace) == in_trace, method
        assert (method in xtail) == in_xtail, method


def test_an_older_name_of_an_option_works_and_is_noted(tmp_path, capsys):
    words = ["xtail", "--preset", "small", "--settings"]
    for name, note in (("--datasets", "--datasets is an older name of --tasks"), ("--tasks", "")):
        assert main([*words, name, "digits"]) == 0
        assert capsys.readouterr().err.strip() == (note and f"moram xtail: {note}")
