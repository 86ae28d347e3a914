"""`accumops bench`: measures accumulation beside other ways to do it, and beside the limit that the machine sets."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from accumops.cli.console import console, human_bytes, table
from accumops.cli.info import describe
from accumops.cli.picture import check_matplotlib, check_picture, draw_bars
from accumops.cli.report import json_option, write_json

if TYPE_CHECKING:
    from accumops.benchmark import Result, Row

NOTHING_TO_MEASURE = 3
SUITES = (
    "accumulate",
    "update",
    "batch-norm",
    "window",
    "window-loss",
    "window-norm",
    "recompute",
    "goals",
    "limit",
    "plan",
    "memory",
)


@click.command()
@click.argument("suite", type=click.Choice(SUITES), metavar="SUITE")
@click.option(
    "--device",
    type=click.Choice(["CPU", "GPU"], case_sensitive=False),
    default="CPU",
    metavar="[CPU|GPU]",
    help="The device that does the work.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=2),
    show_default="30, for window-loss, recompute and limit 10, for window-norm 5, for goals, plan and memory 3",
    help="Measurements of each contender.",
)
@json_option
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=check_picture,
    help="Draw the results as bars in this file; needs matplotlib.",
)
@click.pass_context
def bench(
    context: click.Context, suite: str, device: str, rounds: int | None, json_file: Path | None, picture: Path | None
) -> None:
    """Measure contenders in turns, and print their medians.

    \b
    accumulate  one micro-step over the 214 trainable variables of ResNet-50
    update      AdamW's step over the same variables
    batch-norm  forward and backward of one layer, and a window of a network
    window      4 micro-batches of 16 and their update, in six models
    window-loss a contrastive loss over the whole batch: time and memory
    window-norm batch normalization over the whole batch: time and memory
    recompute   training that computes activations again: time and memory
    goals       recompute for memory goals: the planned and the measured peak
    limit       recompute or a smaller micro-batch, in the same memory
    plan        planned micro-batches for memory limits: peak and speed
    memory      peak memory of training by effective batch size

    Each suite has a floor to compare with: the time that the memory's bandwidth allows, the time of forward and
    backward alone, or the memory that one micro-batch needs. The exit code is 3 if the fused ops cannot run.
    """
    if picture is not None:
        check_matplotlib()
    # Some contenders run in processes of their own and share the GPU with this one. TensorFlow reads the variable when
    # it first uses a GPU.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    facts = describe()

    from accumops import LibraryError, benchmark
    from accumops.verification import fused_problem

    if (problem := fused_problem(device.lower())) is not None:
        click.echo(f"There is nothing fused to measure: {problem}.", err=True)
        context.exit(NOTHING_TO_MEASURE)
    if rounds is None:
        rounds = benchmark.default_rounds(suite)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(f"bench {suite}", total=benchmark.turns(suite, rounds))
        try:
            result = benchmark.run(suite, device=device, rounds=rounds, progress=lambda: progress.advance(task))
        except LibraryError as error:
            click.echo(str(error), err=True)
            context.exit(NOTHING_TO_MEASURE)
    print_result(result)
    if json_file is not None:
        report = {"accumops": facts, "suite": suite, "device": device, "rounds": rounds, "result": result.as_json()}
        write_json(json_file, report)
    if picture is not None:
        draw_bars(result, picture)


def print_result(result: "Result") -> None:
    """Prints the rows as a table."""
    columns: dict[str, Callable[[Row], str]] = {
        "ms": lambda row: _number(row.milliseconds, ".2f"),
        "peak": lambda row: "" if row.peak_bytes is None else human_bytes(row.peak_bytes),
        "quartiles ±": lambda row: "" if row.spread is None else f"{50 * row.spread:.0f} %",
        "GB/s": lambda row: "" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e9:.1f}",
        "of bandwidth": lambda row: _number(result.share(row), ".2f"),
        "over floor": lambda row: _number(result.ratio(row), ".2f"),
        "": lambda row: escape(row.note or ""),
    }
    shown = {name: text for name, text in columns.items() if any(text(row) for row in result.rows)}
    output = table(
        title=result.title, caption="\n".join(["Medians; the contenders of a case take turns.", *result.footnotes])
    )
    cases = result.cases()
    if len(cases) > 1:
        output.add_column("case")
    output.add_column("contender", no_wrap=True)
    for name in shown:
        output.add_column(name, justify="right" if name else "left")
    for case, rows in cases.items():
        for row in rows:
            first = [case if row is rows[0] else ""] if len(cases) > 1 else []
            output.add_row(
                *first, escape(row.name), *(text(row) for text in shown.values()), end_section=row is rows[-1]
            )
    console().print(output)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
