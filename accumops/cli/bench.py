"""`accumops bench`: how fast the fused ops are, beside TensorFlow's own and beside the memory."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from accumops.cli.console import console, table
from accumops.cli.info import describe
from accumops.cli.report import json_option, write_json

if TYPE_CHECKING:
    from accumops.benchmark.accumulate import Result

NOTHING_TO_MEASURE = 3


@click.command()
@click.argument("suite", type=click.Choice(["accumulate"]))
@click.option("--rounds", type=click.IntRange(min=2), default=30, help="Timed runs of each contender.")
@json_option
@click.pass_context
def bench(context: click.Context, suite: str, rounds: int, json_file: Path | None) -> None:
    """Time contenders interleaved in one process, and print their medians.

    The suite `accumulate` is one micro-step over the 214 trainable variables of ResNet-50 on the CPU. Exits with 3
    where there are no fused ops to measure.
    """
    facts = describe()

    from accumops import LibraryError
    from accumops.benchmark import accumulate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"bench {suite}", total=rounds + accumulate.WARMUP)
        try:
            result = accumulate.run(rounds=rounds, progress=lambda: progress.advance(task))
        except LibraryError as problem:
            click.echo(str(problem), err=True)
            context.exit(NOTHING_TO_MEASURE)
    _print(result)
    if json_file is not None:
        write_json(json_file, {"accumops": facts, "suite": suite, "rounds": rounds, "result": asdict(result)})


def _print(result: "Result") -> None:
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
