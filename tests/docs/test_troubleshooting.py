"""The messages that `docs/troubleshooting.md` quotes are those of the sources."""

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGE = _ROOT / "docs" / "troubleshooting.md"
_GAP = "…"


def quoted():
    """The headings that quote a message: each its text, with gaps where a name or a number stands."""
    for line in _PAGE.read_text().splitlines():
        match = re.fullmatch(r"###? (`+)(.+)\1", line)
        if match is not None:
            yield match[2].strip()


def text_of(node):
    """A string of the sources with gaps for what is filled in, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*\}", _GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_GAP if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


def nodes():
    for path in sorted((_ROOT / "accumops").rglob("*.py")):
        if not {"benchmark", "verification"} & set(path.parts):
            yield from ast.walk(ast.parse(path.read_text()))


def pattern_of(quote):
    return ".*".join(re.escape(part.strip()) for part in quote.split(_GAP))


@pytest.fixture(scope="module")
def messages():
    """The strings of the sources."""
    return {text for node in nodes() if (text := text_of(node)) is not None and len(text) > 10}


QUOTES = list(quoted())


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_messages_are_in_the_sources(quote, messages):
    assert max(len(part.strip()) for part in quote.split(_GAP)) >= 8
    pattern = re.compile(pattern_of(quote), re.DOTALL)
    assert any(pattern.search(message) for message in messages)


def test_each_message_is_quoted_once():
    assert len(QUOTES) > 50
    assert len(set(QUOTES)) == len(QUOTES)


def test_all_warnings_are_on_the_page():
    warned = [
        text
        for node in nodes()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "warnings.warn") and node.args
        if (text := text_of(node.args[0])) is not None
    ]
    assert len(warned) > 10
    patterns = [re.compile(pattern_of(quote), re.DOTALL) for quote in QUOTES]
    assert [text for text in warned if not any(pattern.search(text) for pattern in patterns)] == []
