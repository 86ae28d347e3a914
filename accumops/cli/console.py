"""Consoles and tables of the commands: colours in a terminal, plain text everywhere else."""

from rich import box
from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 240  # columns in a file, which has no width of its own; wide enough for every table


def console(stderr: bool = False) -> Console:
    """Returns a console that prints on stdout or stderr, in colour only if that is a terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def table(title: str | None = None, caption: str | None = None, show_header: bool = True) -> Table:
    """Returns an empty table in the style that all commands share."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE,
        show_header=show_header,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )


def human_bytes(count: int) -> str:
    """Returns a number of bytes with a unit that fits it.

    Example:

    >>> from accumops.cli.console import human_bytes
    >>> human_bytes(512), human_bytes(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
