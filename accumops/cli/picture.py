"""Draws results with matplotlib, which is an optional package."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from accumops.benchmark import Result, Row

_SUFFIXES = (".png", ".pdf", ".svg")
_OURS, _FLOOR, _OTHERS = "#08519c", "#9ecae1", "#bdbdbd"


def check_picture(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Checks the name of a picture before the work starts. It is the callback of options that take one."""
    if path is not None and path.suffix.lower() not in _SUFFIXES:
        raise click.BadParameter(f"{str(path)!r} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {str(path.parent)!r}")
    return path


def check_matplotlib() -> None:
    """Raises an error if matplotlib is missing, before the work starts."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"a picture needs matplotlib ({error}): pip install matplotlib") from error


def draw_bars(result: "Result", path: Path) -> None:
    """Draws the rows of each case as bars, with a line at the floor, and saves the picture.

    Raises:
        click.FileError: If the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    cases = {case: [row for row in rows if row.value is not None] for case, rows in result.cases().items()}
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    longest = max(len(rows) for rows in cases.values())
    figure = Figure(figsize=(8 * columns, (0.3 * longest + 0.9) * lines), layout="constrained")
    figure.suptitle(result.title)
    for i, (case, rows) in enumerate(cases.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        in_mebibytes = any(row.peak_bytes is not None for row in rows)
        unit, scale = ("MiB", 2.0**-20) if in_mebibytes else ("ms", 1.0)
        values = [scale * (row.value or 0.0) for row in rows]
        bars = axes.barh(range(len(rows)), values, color=[_colour(row) for row in rows])
        axes.bar_label(bars, labels=[_label(result, row, scale, unit) for row in rows], padding=3, fontsize=8)
        for row, value in zip(rows, values, strict=True):
            if row.floor:
                axes.axvline(value, color=_OURS, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(case, fontsize=10)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"Picture saved to {path}")


def _colour(row: "Row") -> str:
    if row.floor:
        return _FLOOR
    return _OURS if row.name.startswith(("accumops", "fused")) else _OTHERS


def _label(result: "Result", row: "Row", scale: float, unit: str) -> str:
    ratio = result.ratio(row)
    value = scale * (row.value or 0.0)
    text = f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return text if ratio is None else f"{text}, {ratio:.2f} x"
