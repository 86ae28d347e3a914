"""The option `--json FILE` of the commands that produce results."""

import json
from pathlib import Path
from typing import Any

import click


def _check_directory(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Fails before the work is done, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {str(path.parent)!r}")
    return path


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_check_directory,
    help="Write all results to this file, with a description of machine and build.",
)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the report, or raises click's error for files."""
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from error
    click.echo(f"Results written to {path}")
