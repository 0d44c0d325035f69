"""The pages of the repository: their snippets run, their commands parse, what they name exists."""

import argparse
import ast
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml

import moram
from moram.cli import main
from moram.methods import accepted_arguments

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, FRONT_LINES, LINES = 100, 130, 300
# What a page may begin a path with.
TOPS = ("moram/", "moram_kernels/", "benchmarks/", "tests/", ".ci/")


def tracked(*patterns):
    """Files that belong to the repository, also those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()})


# table.md is what `moram table` writes.
PAGES = [page for page in tracked("*.md") if page.name != "table.md"]
HAND_WRITTEN = [page for page in PAGES if "results" not in page.parts]
FENCE = re.compile(r"^(<!-- not run: .+? -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The fenced blocks of a language: (whether it runs, its text)."""
    found = (match.groups() for match in FENCE.finditer(page.read_text(encoding="utf-8")))
    return [(mark is None, text) for mark, kind, text in found if kind == language]


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page):
    """What stands between backticks, over line ends too."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def commands(page):
    """Shell commands of the blocks, and those between backticks that have arguments."""
    joined = [text.replace("\\\n", " ") for _, text in blocks(page, "sh")]
    lines = [line for text in joined for line in text.splitlines()]
    lines += [span for span in spans(page) if re.match(r"(moram|make|python) \S", span)]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


class Parsed(BaseException):
    """What a command's parser made of its arguments; ends the program before it runs."""


@pytest.fixture
def parse(monkeypatch):
    """A function from a call to what its parser says."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    def parsed(call):
        with pytest.raises(Parsed) as found:
            call()
        return found.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    return parsed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_short_and_narrow(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (FRONT_LINES if page == ROOT / "README.md" else LINES)
    assert not [line for line in lines if len(line) > COLUMNS]


@cache
def run_snippets(page):
    """The names that a page's snippets leave behind, once they ran from its top to its end."""
    names, start = {}, os.getcwd()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for runs, text in blocks(page, "python"):
                code = compile(text, name_of(page), "exec")
                if runs:
                    exec(code, names)
        finally:
            os.chdir(start)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_snippets_of_a_page_run_from_top_to_end(page):
    for _, text in blocks(page, "python"):
        for path in used(text):
            assert has(path), path
    assert run_snippets(page)


def used(text):
    """Dotted names of this project's packages in a snippet."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {path for path in found if re.fullmatch(r"moram(_kernels)?(\.\w+)+", path)}


def has(path):
    """Whether a dotted name of this project exists."""
    first, *rest = path.split(".")
    found = importlib.import_module(first)
    for place, name in enumerate(rest, 1):
        if not hasattr(found, name):
            module = ".".join([first, *rest[:place]])
            if importlib.util.find_spec(module) is None:
                return False
            importlib.import_module(module)
        found = getattr(found, name)
    return True


def test_the_front_example_learns_both_tasks_and_its_copy_answers_alike():
    ((runs, text),) = blocks(ROOT / "README.md", "python")
    assert runs and len([line for line in text.splitlines() if line.strip()]) <= 20
    names = run_snippets(ROOT / "README.md")
    with torch.no_grad():
        for batch in (task[0] for task in names["tasks"]):
            # Guessing among 64 tokens costs log 64 = 4.2.
            assert names["model"](**batch).loss < 1
            logits = [names[which](**batch).logits for which in ("model", "fresh")]
            torch.testing.assert_close(*logits)


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_the_commands_of_a_page_are_taken_by_their_parsers(page, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if "moram" in words and words[0] in ("moram", "accelerate"):
            check_moram(words[words.index("moram") + 1 :], parse)
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))
            if len(words) > 2:
                parse(lambda script=words[1]: runpy.run_path(script, run_name="__main__"))
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] == "pip", words


def check_moram(words, parse):
    """A command of `moram`: its name, its options, and the settings that --set names."""
    if len(words) == 1:
        # The name of a command, in a sentence.
        words = [*words, "--help"]
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0, words
        return
    found = parse(lambda: main(words))
    for change in getattr(found, "changes", None) or ():
        check_setting(words[0], change.split("=")[0], found.method or "moram")


def check_setting(command, name, method):
    settings = importlib.import_module(f"moram.{command}.settings")
    kind = getattr(settings, f"{command.capitalize()}Settings")
    first, _, argument = name.partition(".")
    assert first in {field.name for field in fields(kind)}, name
    assert not argument or argument in accepted_arguments(method), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", prose(page)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_paths_that_a_page_names_exist(page):
    files = {path.name for path in tracked("*.py", "Makefile", "*.toml")}
    for span in spans(page):
        if span.startswith(TOPS) and re.fullmatch(r"[\w./-]+", span):
            assert (ROOT / span).exists() or (page.parent / span).exists(), span
        elif re.fullmatch(r"\w+\.py", span):
            assert span in files, span
        elif re.fullmatch(r"[\w/]+/\w+\.\w+", span):
            assert (page.parent / span).exists(), span


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_names_of_the_library_that_a_page_uses_exist(page):
    for span in spans(page):
        path = re.match(r"moram(_kernels)?(\.\w+)+", span)
        assert path is None or has(path[0]), span


def test_a_snippet_with_a_mark_is_compiled_alone_and_its_names_are_looked_up(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs a download -->\n```python\nmoram.inject(far)\n```\n\n"
        "```python\nfrom moram_kernels import retrieve\n```\n\n```sh\nmake demo  # quick\n```\n"
    )
    marked, plain = blocks(page, "python")
    assert marked == (False, "moram.inject(far)\n") and plain[0]
    assert used(marked[1]) == {"moram.inject"} and has("moram.inject")
    assert used(plain[1]) == {"moram_kernels.retrieve"} and has("moram_kernels.retrieve")
    assert not has("moram.injekt") and not has("moram.xtail.nothing")
    assert commands(page) == [["make", "demo"]]


def test_an_option_that_a_command_lacks_is_found(parse):
    assert parse(lambda: main(["trace", "--order", "2"])).order == 2
    check_moram(["trace", "--set", "method_args.protect=0.95"], parse)
    for setting in ("method_args.protekt", "ordr"):
        with pytest.raises(AssertionError, match=setting.replace(".", r"\.")):
            check_moram(["trace", "--set", f"{setting}=1"], parse)


def test_every_folder_is_on_the_map_of_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = text[text.index("## The rooms") : text.index("## Where a line belongs")]
    listed = set(re.findall(r"^\| `(\S+)/` \|", rooms, re.MULTILINE))
    inits = tracked("moram*/**/__init__.py", "moram*/__init__.py")
    packages = {name_of(path.parent) for path in inits}
    tests = {name_of(path.parent) for path in tracked("tests/*/test_*.py")}
    measured = {name_of(path.parent) for path in tracked("benchmarks/*.py")}
    assert listed == packages | tests | measured | {"benchmarks/results"}


def test_the_front_page_says_what_is_not_the_papers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "**Key protection is this project's own addition to the paper's" in text
    assert "`[+]` is this project's own addition." in text


def test_the_citation_names_paper_and_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == moram.__version__
    paper = found["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2506.21035"
    assert paper["authors"][0]["family-names"] == "Lu"
