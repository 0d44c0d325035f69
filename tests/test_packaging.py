"""What the files around the code promise: the version, the targets of make, what CI runs."""

import re
import subprocess
import sys

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
