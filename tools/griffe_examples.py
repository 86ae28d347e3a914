"""An extension of griffe for the site: examples in docstrings become blocks of code.

A docstring's examples stand behind a line `Example:`, without indentation, as doctest and Keras's own pages read them.
Markdown would make quotations of `>>>`.
"""

import re
from typing import Any

import griffe

# Lines from a `>>>` up to the next empty one.
_DOCTEST = re.compile(r"(?:^>>>.*\n?(?:^(?!\s*$).*\n?)*)", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts fences around the examples of each docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of an object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(docstring: str) -> str:
    """Returns a docstring with fences around its examples."""
    text = _DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring)
    return re.sub(r"^Example:$", "**Example:**", text, flags=re.MULTILINE)
