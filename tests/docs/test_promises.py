"""docs/promises.md names tests and commands that exist, and each part of `make harden`."""

import ast
import re
import shlex
import sys

import pytest
from named_code import ROOT

sys.path.append(str(ROOT / "tools"))
import harden

PAGE = (ROOT / "docs" / "promises.md").read_text()
TESTS = re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", PAGE)
COMMANDS = sorted({span for span in re.findall(r"`([^`\n]+)`", PAGE) if span.startswith(("make ", ".venv/"))})
ROWS = [line for line in PAGE.splitlines() if line.startswith("| **")]


@pytest.mark.parametrize("reference", TESTS)
def test_tests_exist(reference):
    path, *names = reference.split("::")
    body = ast.parse((ROOT / path).read_text()).body
    for name in names:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        assert found, f"{path} has no {name}"
        body = found[0].body
    marks = [ast.unparse(each) for each in found[0].decorator_list]
    assert "pytest.mark.exhaustive" not in marks, "`make test` does not run it"


def test_each_promise_has_tests_and_a_long_version():
    assert len(ROWS) == 9
    for row in ROWS:
        _, _, tests, command, _ = row.split("|")
        assert "::" in tests
        assert re.search(r"`(make harden|\.venv/bin/python -m pytest -m exhaustive)", command)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        given = dict(word.split("=") for word in words[2:])
        assert set(given) <= {"MINUTES", "PARTS"}
        assert set(given.get("PARTS", "").split()) <= set(harden.PARTS)
    else:
        assert words[:5] == [".venv/bin/python", "-m", "pytest", "-m", "exhaustive"]
        assert all((ROOT / word).exists() for word in words[5:])


def test_parts_are_the_scripts_and_on_the_page():
    scripts = {path.stem for path in (ROOT / "tests" / "harden").glob("*.py")} - {"conftest", "supervised"}
    assert set(harden.PARTS) == scripts
    table = PAGE.partition("## The long versions")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(harden.PARTS)
    used = {part for parts in re.findall(r'PARTS="([^"]+)"', PAGE) for part in parts.split()}
    assert used == set(harden.PARTS)
