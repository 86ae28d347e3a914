"""An extension of griffe for the site: examples in docstrings become blocks of code, and names of pages become links.

A docstring's examples stand behind a line `Example:`, without indentation, as doctest reads them. Markdown would make
quotations of `>>>`.
"""

import re
from pathlib import Path
from typing import Any

import griffe

# Lines from a `>>>` up to the next empty one.
_DOCTEST = re.compile(r"(?:^>>>.*\n?(?:^(?!\s*$).*\n?)*)", re.MULTILINE)
_PAGE = re.compile(r"`docs/(\w+)\.md`")
_DOCS = Path(__file__).parent.parent / "docs"


class Docstrings(griffe.Extension):
    """Puts fences around the examples of each docstring, and links the pages that it names."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of an object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = with_links(with_fences(obj.docstring.value))


def with_fences(docstring: str) -> str:
    """Returns a docstring with fences around its examples."""
    text = _DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring)
    return re.sub(r"^Example:$", "**Example:**", text, flags=re.MULTILINE)


def with_links(docstring: str) -> str:
    """Returns a docstring with links to the pages of docs/ that it names, as the pages of docs/api/ need them."""

    def link(found: re.Match[str]) -> str:
        if not (_DOCS / f"{found[1]}.md").is_file():
            raise FileNotFoundError(f"a docstring names {found[0]}, which does not exist")
        return f"[{found[1].replace('_', ' ')}](../../{found[1]}/)"  # nobody changes links in docstrings for the site

    return _PAGE.sub(link, docstring)
