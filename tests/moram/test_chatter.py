"""Commands say what they have to say; libraries do not speak of themselves in their output.

Of `moram trace` and `moram table`, test_trace_runs.py.
"""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from support import ROOT
from trace_support import write_data, write_model
from xtail_support import write_backbone, write_domains

from moram.harness.chatter import without_chatter

ENUM = "%s is an Enum subclass and is now natively supported by torch.compile"
SKIPPED = "Skipping import of cpp extensions due to incompatible torch version."


@pytest.fixture
def heard(caplog):
    def hear(name, message, *arguments):
        caplog.clear()
        logging.getLogger(name).warning(message, *arguments)
        return caplog.messages

    return hear


def test_what_libraries_say_of_themselves_is_dropped_within_a_command_alone(heard):
    for name, message, *rest in (("torch.utils._pytree", ENUM, int), ("torchao", SKIPPED)):
        with without_chatter():
            assert heard(name, message, *rest) == []
        assert len(heard(name, message, *rest)) == 1


@pytest.mark.parametrize("name", ["torch.utils._pytree", "torchao", "transformers", "moram"])
def test_whatever_else_a_library_says_is_passed_on(heard, name):
    with without_chatter():
        assert heard(name, "your weights are damaged") == ["your weights are damaged"]


@pytest.mark.parametrize(
    ("module", "said"), [("torchao.dtypes", 0), ("torch.nn", 1), ("transformers.torchao", 1)]
)
def test_warnings_are_dropped_by_module(module, said):
    # Recorded within: what would be shown.
    with without_chatter(), warnings.catch_warnings(record=True) as found:
        warnings.warn_explicit("old", UserWarning, "file.py", 1, module, registry={})
    assert len(found) == said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What commands read."""
    folder = tmp_path_factory.mktemp("chatter")
    write_model(folder / "model")
    write_data(folder / "data")
    write_domains(folder / "images")
    write_backbone(folder / "clip")
    return folder


COMMANDS = {
    "demo": (
        "demo --model model --data data --tasks letters --epochs 1 --first-layer 1 --out demo",
        "model: model, torch.float32, ",
    ),
    "xtail": (
        "xtail --model local-dir:clip --data images --tasks tools --shots 2 --out tools "
        "--method zero-shot --set cache_gib=0.1",
        "tools: 2 classes, 4 train, 8 test images",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_library_speaks_before_a_commands_first_line(folder, command):
    arguments, first = COMMANDS[command]
    found = subprocess.run(
        [sys.executable, "-m", "moram", *arguments.split()],
        capture_output=True,
        text=True,
        # The package under test, whatever else is installed.
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(first)
    # The demo draws its bars into whatever stderr is.
    lines = [line for line in found.stderr.splitlines() if "ex/s]" not in line and line]
    assert lines == []
