"""Packages that import their names when they are asked for behave as if they had imported them."""

import ast
import inspect
import pickle
import subprocess
import sys

import pytest
from support import ROOT

import moram
from moram import methods

PACKAGES = {"moram": moram, "moram.methods": methods}
each_package = pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)


def fresh(code):
    """What a fresh interpreter prints, a list of lines."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


@each_package
def test_type_checkers_see_the_names_that_are_imported_when_asked_for(package):
    tree = ast.parse(inspect.getsource(package))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == package._homes
    assert set(seen) == set(package.__all__)


@each_package
def test_every_public_name_is_listed_and_is_what_its_module_defines(package):
    assert set(package.__all__) <= set(dir(package))
    for name, home in package._homes.items():
        value = getattr(package, name)
        assert value is vars(sys.modules[f"{package.__name__}.{home}"])[name], name


@pytest.mark.parametrize(
    "first",
    [
        "import moram.task, moram.inject",
        "from moram.inject import adapters; from moram.task import begin_task",
        "from moram import checkpoint; import moram.trace.run",
        "from moram import *",
        "moram.task; moram.inject; import moram.task, moram.inject",
    ],
)
def test_a_function_keeps_the_name_that_it_shares_with_a_module(first):
    code = f"import moram; {first}; print(type(moram.task).__name__, type(moram.inject).__name__)"
    assert fresh(f"{code}; import moram.task as t; print(t is moram.task)") == [
        "function function",
        "True",
    ]


def test_importing_moram_reads_no_torch_until_a_name_is_asked_for():
    code = "import sys, moram; print('torch' in sys.modules); moram.AtomBank; "
    assert fresh(f"{code}print('torch' in sys.modules)") == ["False", "True"]


def test_modules_of_a_package_need_no_import_of_their_own():
    code = "import moram; print(moram.models.PRESETS is __import__('moram.models').models.PRESETS)"
    assert fresh(code) == ["True"]


@each_package
def test_a_name_that_is_not_there_is_refused_as_of_any_module(package):
    message = f"^module {package.__name__!r} has no attribute 'moran'$"
    with pytest.raises(AttributeError, match=message):
        _ = package.moran
    with pytest.raises(ImportError, match=f"cannot import name 'moran' from {package.__name__!r}"):
        exec(f"from {package.__name__} import moran")
    assert not hasattr(package, "__wrapped__")


def test_a_library_that_a_module_lacks_is_named_and_not_hidden(tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text(
        "from moram.lazy import attach\nattach(__name__, {'till': ('open',)})\n"
    )
    (tmp_path / "shop" / "till.py").write_text("import a_library_that_nobody_has\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import shop\n"
        "for name in ('open', 'till'):\n"
        "    try: getattr(shop, name)\n"
        "    except ModuleNotFoundError as error: print(error.name)"
    )
    assert fresh(code) == ["a_library_that_nobody_has"] * 2


def test_names_and_packages_are_pickled_by_their_place():
    for thing in (moram.task, moram.inject, moram.MoRAMConfig, methods.EWC, moram, methods):
        written = pickle.dumps(thing)
        assert pickle.loads(written) is thing and len(written) < 100
