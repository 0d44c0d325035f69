"""What docstrings promise: a function with many parameters says what each is."""

import ast
import inspect
import re

import pytest
from support import ROOT

PACKAGES = ("moram", "moram_kernels")
# "Args:", "Args, Raises: see ...".
SECTION = re.compile(r"^Args\b[\w, ]*:", flags=re.M)
MANY = 4


def undocumented(source):
    """Names of the public functions with many parameters whose docstrings have no Args.

    Those of an `__init__` may stand in the class's docstring. Kernels say theirs beside each
    parameter; the parameters of a method leave out the object or class itself.
    """
    found = []

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                visit(child, [*path, child.name])
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                private = child.name.startswith("_") and child.name != "__init__"
                kernel = any("triton.jit" in ast.unparse(d) for d in child.decorator_list)
                documented = child if child.name != "__init__" else node
                doc = inspect.cleandoc(ast.get_docstring(documented) or "")
                many = len(_parameters(child, bool(path))) >= MANY
                if many and not private and not kernel and not SECTION.search(doc):
                    found.append(".".join([*path, child.name]))

    visit(ast.parse(source), [])
    return found


def _parameters(function, in_class):
    given = function.args
    named = [*given.posonlyargs, *given.args]
    plain = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    named = named[1:] if in_class and not plain else named
    others = [*given.kwonlyargs, given.vararg, given.kwarg]
    return [*named, *(parameter for parameter in others if parameter is not None)]


SOURCE = '''
def three(a, b, c): "No more."
def four(a, b, c, d): "Too many."
def keywords(a, *b, c, **d): "Too many."
def told(a, b, c, d):
    """Many.

    Args:
        a: first.
    """
def referred(a, b, c, d):
    """Many.

    Args, Raises: see `told`.
    """
def spoken(a, b, c, d):
    "Its Args: are inside a sentence."
def _private(a, b, c, d): "Nobody's business."
@triton.jit
def kernel(a, b, c, d): "Beside each."
class Thing:
    """A thing.

    Args:
        a: first.
    """
    def __init__(self, a, b, c, d): pass
    def few(self, a, b, c): pass
    def many(self, a, b, c, d): pass
    @staticmethod
    def bare(a, b, c, d): pass
    @classmethod
    def made(cls, a, b, c, d): pass
class Silent:
    def __init__(self, a, b, c, d): pass
class _Hidden:
    def many(self, a, b, c, d): pass
'''


def test_functions_without_args_are_found():
    assert undocumented(SOURCE) == [
        "four",
        "keywords",
        "spoken",
        "Thing.many",
        "Thing.bare",
        "Thing.made",
        "Silent.__init__",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_with_many_parameters_say_what_they_are(package):
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in undocumented(path.read_text(encoding="utf-8")):
            found.setdefault(str(path.relative_to(ROOT)), []).append(name)
    assert found == {}
