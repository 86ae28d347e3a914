"""`accumops bench`: how fast the fused ops are, beside TensorFlow's own and beside the memory."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from accumops.cli.console import console, table
from accumops.cli.info import describe
from accumops.cli.report import json_option, write_json

if TYPE_CHECKING:
    from accumops.benchmark import accumulate, batch_norm

NOTHING_TO_MEASURE = 3


@click.command()
@click.argument("suite", type=click.Choice(["accumulate", "batch-norm"]))
@click.option("--rounds", type=click.IntRange(min=2), default=30, help="Timed runs of each contender.")
@json_option
@click.pass_context
def bench(context: click.Context, suite: str, rounds: int, json_file: Path | None) -> None:
    """Time contenders interleaved in one process, and print their medians.

    The suite `accumulate` is one micro-step over the 214 trainable variables of ResNet-50 on the CPU; `batch-norm` is
    forward and backward of one layer, and a window of a small network. Exits with 3 where there are no fused ops to
    measure.
    """
    facts = describe()

    from accumops import LibraryError
    from accumops.benchmark import accumulate, batch_norm

    suites: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "accumulate": (accumulate, _print),
        "batch-norm": (batch_norm, _print_batch_norm),
    }
    module, show = suites[suite]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"bench {suite}", total=module.turns(rounds))
        try:
            result = module.run(rounds=rounds, progress=lambda: progress.advance(task))
        except LibraryError as problem:
            click.echo(str(problem), err=True)
            context.exit(NOTHING_TO_MEASURE)
    show(result)
    if json_file is not None:
        write_json(json_file, {"accumops": facts, "suite": suite, "rounds": rounds, "result": asdict(result)})


def _print_batch_norm(result: "batch_norm.Result") -> None:
    output = table(
        title="batch normalization: forward and backward, and a window of a network with six of them",
        caption="Medians, interleaved within each case. GB/s counts the bytes that eight passes move.",
    )
    for header in ("case", "contender"):
        output.add_column(header)
    for header in ("ms", "quartiles ±", "GB/s", "time / last"):
        output.add_column(header, justify="right")
    ours = {row.case: row.milliseconds for row in result.rows}
    for i, row in enumerate(result.rows):
        first = i == 0 or result.rows[i - 1].case != row.case
        output.add_row(
            row.case if first else "",
            row.name,
            f"{row.milliseconds:.2f}",
            f"{50 * row.spread:.0f} %",
            "" if row.bytes_moved is None else f"{row.bytes_moved / row.milliseconds / 1e6:.1f}",
            f"{row.milliseconds / ours[row.case]:.2f}",
            end_section=i + 1 == len(result.rows) or result.rows[i + 1].case != row.case,
        )
    console().print(output)


def _print(result: "accumulate.Result") -> None:
    triad = max(row.bytes_per_second for row in result.rows if row.name.startswith("triad"))
    fused = result.row("fused").milliseconds
    output = table(
        title=f"accumulate: {result.values / 1e6:.1f} million float32 values in {result.variables} variables",
        caption=(
            "Medians of one interleaved run. GB/s counts the bytes that the operation has to move, share is of the "
            "faster triad."
        ),
    )
    output.add_column("contender")
    for header in ("ms", "quartiles ±", "bytes/value", "GB/s", "share", "time / fused"):
        output.add_column(header, justify="right")
    for row in result.rows:
        output.add_row(
            row.name,
            f"{row.milliseconds:.2f}",
            f"{50 * row.spread:.0f} %",
            str(row.bytes_per_value),
            f"{row.bytes_per_second / 1e9:.1f}",
            f"{row.bytes_per_second / triad:.2f}",
            f"{row.milliseconds / fused:.2f}",
        )
    console().print(output)
