"""What the documents say runs: README's code, its commands, and every docstring's example."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import normwise
from normwise import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()

BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def code(text: str) -> str:
    """What stands in code: blocks of the shell, and `inline`."""
    shell = "\n".join(blocks(text, "", "sh", "bash", "shell", "console"))
    return shell + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# README's python, block after block in one namespace, as a reader would type it.


@pytest.fixture
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("somewhere_else", "threads")
@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_run(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks(path.read_text(), "python", "py")):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, namespace, name_of(path), None, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            assert runner.run(test, clear_globs=False).failed == 0
            namespace = test.globs
        else:
            exec(compile(block, f"{name_of(path)}, block {number + 1}", "exec"), namespace)


def test_readme_shows_the_drop_in() -> None:
    assert any("normwise" in block for block in blocks(README, "python"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    lines = re.findall(r"\bmake((?: +[a-z][\w-]*)+)", code(path.read_text()))
    assert {target for line in lines for target in line.split()} <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_are_those_of_the_command_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = re.findall(
        r"(?:^|[ (])normwise +([a-z]+)((?: +--[\w-]+)*)", code(path.read_text()), re.M
    )
    for command, options in named:
        assert cli.main([command, "--help"]) == 0, command
        usage = capsys.readouterr().out
        assert all(option in usage for option in options.split()), (command, options)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_linked_to_exist(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", path.read_text()))
    missing = [
        link
        for link in links
        if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_names_of_the_package_exist(path: Path) -> None:
    """`nw.nn.BatchNorm2d` in a document is a name that can be got."""
    for dotted in set(
        re.findall(r"\b(?:nw|normwise)((?:\.[A-Za-z_]\w*)+)", code(path.read_text()))
    ):
        value: Any = normwise
        for part in dotted.strip(".").split("."):
            if not hasattr(value, part):
                assert importlib.util.find_spec(f"{value.__name__}.{part}"), dotted
                value = importlib.import_module(f"{value.__name__}.{part}")
            else:
                value = getattr(value, part)


# Docstrings

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(normwise.__path__, "normwise.")
    if not m.name.endswith(("_native", "__main__"))
)


@pytest.mark.parametrize("name", ["normwise", *MODULES])
def test_docstring_examples(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(t.examples) for m in modules for t in finder.find(m)) > 0


@pytest.mark.parametrize("name", ["nn", "functional", "Moments", "backends", "errors"])
def test_public_names_have_documentation(name: str) -> None:
    holder = getattr(normwise, name)
    assert holder.__doc__
    for public in getattr(holder, "__all__", ()):
        if callable(getattr(holder, public)):
            assert getattr(holder, public).__doc__, public
