"""What the files around the code promise: the version, the targets of make, what CI runs."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from support import ROOT

import moram


def test_the_version_is_written_in_one_place():
    command = [sys.executable, "setup.py", "--name", "--version", "--author"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:3] == ["moram", moram.__version__, "MoRAM contributors"]
    literal = re.compile(rf"""["']{re.escape(moram.__version__)}["']""")
    paths = [ROOT / "setup.py", *(ROOT / "moram").rglob("*.py")]
    holders = [path.name for path in paths if literal.search(path.read_text(encoding="utf-8"))]
    assert holders == ["_version.py"]


def targets():
    """The targets of the Makefile that make no file."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return " ".join(re.findall(r"^\.PHONY: (.*)$", text, flags=re.M)).split()


@pytest.mark.parametrize("words", [[], ["help"]], ids=["make", "make help"])
def test_make_says_what_every_target_is_and_does_nothing_else(words):
    command = ["make", "VENV=/nowhere", *words]
    # Not as a part of the make that runs the tests.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    usage, *lines = run.stdout.splitlines()
    assert usage.startswith("make TARGET ")
    said = dict(line.split(maxsplit=1) for line in lines)
    assert sorted(said) == sorted(targets()) and "test" in said


def test_ci_runs_what_everybody_runs():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]


def test_the_lint_before_a_commit_is_that_of_make(tmp_path):
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (group,) = yaml.safe_load(text)["repos"]
    ran = {hook["entry"].split(" --")[0].removeprefix(".venv/bin/") for hook in group["hooks"]}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    linted = {line.removeprefix("$(BIN)/") for line in recipe[1].replace("\t", "").splitlines()}
    assert ran == {"ruff check", "ruff format"}
    # Types take half a minute: they are checked by make alone.
    types = {"basedpyright --pythonpath $(BIN)/python"}
    assert linted == {"ruff check .", "ruff format --check ."} | types
    # A file as pre-commit gives it.
    (tmp_path / "ugly.py").write_text("import os\nx = [1,2]\n")
    for hook in group["hooks"]:
        _, *words = hook["entry"].split()
        command = [sys.executable, "-m", "ruff", *words, str(tmp_path / "ugly.py")]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == (hook["id"] == "ruff-check"), run.stderr
    assert (tmp_path / "ugly.py").read_text() == "x = [1, 2]\n"
