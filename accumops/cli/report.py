"""The option `--json FILE`, which writes a command's results to a file."""

import json
from pathlib import Path
from typing import Any

import click


def _check_directory(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Checks that the file's directory exists before the work starts."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {str(path.parent)!r}")
    return path


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_check_directory,
    help="Write all results to this file, with a description of the machine and the build.",
)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the report.

    Raises:
        click.FileError: If the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"Results written to {path}")
