"""The pages of the documentation, parsed: their blocks of code, their links and their headings."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")
_ANCHOR = re.compile(r"""<a (?:id|name)=["']([^"']+)["']""")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    code: str
    line: int
    """The line of the page on which the code begins, counted from 1."""
    is_run: bool
    """Whether no comment `<!-- not run: why -->` stands before it."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    before = None
    for token in _tokens(page):
        if token.type == "fence":
            is_run = not (before is not None and _NOT_RUN.fullmatch(before))
            found.append(Block(token.info.strip(), token.content, token.map[0] + 2, is_run))
        if token.type in ("fence", "html_block", "inline"):
            before = token.content.strip() if token.type == "html_block" else None
    return found


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the target of each link and picture."""
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if target is not None:
                yield token.map[0] + 1, str(target)
        if token.type == "html_block":
            for target in re.findall(r"""(?:href|src|srcset)=["']([^"']+)["']""", token.content):
                yield token.map[0] + 1, target


def anchors(page: Path) -> set[str]:
    """What links can name behind a `#`: the headings, as GitHub and the site write them, and anchors in HTML."""
    tokens = _tokens(page)
    found = {slug(after) for token, after in itertools.pairwise(tokens) if token.type == "heading_open"}
    return found | set(_ANCHOR.findall(page.read_text()))


def slug(heading: Token) -> str:
    text = "".join(child.content for child in heading.children or ())
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())
