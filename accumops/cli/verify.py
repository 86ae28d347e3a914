"""`accumops verify`: checks that the fused ops compute the same as the reference on this machine."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from accumops.cli.console import console, table
from accumops.cli.info import describe
from accumops.cli.report import json_option, write_json

if TYPE_CHECKING:
    from accumops.verification import Result

OVER_BOUND = 1
NOTHING_TO_VERIFY = 3


@click.command()
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu", "auto"]),
    default="auto",
    help="The device that runs the ops; auto takes a GPU if the fused ops can use it.",
)
@click.option("--quick", is_flag=True, help="Run a small part of the grid only.")
@json_option
@click.pass_context
def verify(context: click.Context, device: str, quick: bool, json_file: Path | None) -> None:
    """Compare every fused op with the reference, and both with float64.

    The exit code is 0 if all errors are within their bounds, 1 if one is not, and 3 if the fused ops cannot run.
    """
    facts = describe()

    from accumops.verification import NothingToVerify, find_device

    try:
        place = find_device(device)
    except NothingToVerify as problem:
        click.echo(str(problem), err=True)
        context.exit(NOTHING_TO_VERIFY)
    results = _run(device, quick)
    groups = list(_summaries(results))
    _print(groups, results, place)
    if json_file is not None:
        record = {
            "accumops": facts,
            "device": place,
            "quick": quick,
            "ok": all(result.ok for result in results),
            "unit": "errors and bounds are in ulp of the summed magnitude; null bounds are not applied",
            "groups": groups,
            "cases": [{**asdict(result), "ok": result.ok} for result in results],
        }
        write_json(json_file, _as_json(record))
    context.exit(0 if all(result.ok for result in results) else OVER_BOUND)


def _run(device: str, quick: bool) -> "list[Result]":
    from accumops import verification

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("verifying", total=None)

        def advance(done: int, total: int, result: "Result") -> None:
            bar.update(task, completed=done, total=total, description=f"{result.op}, {result.layout}")

        return verification.run(device=device, quick=quick, progress=advance)


def _summaries(results: "list[Result]") -> Iterator[dict[str, Any]]:
    """Yields the largest errors of each op, layout and mode, in the order of the results."""
    order: dict[tuple[str, str], int] = {}
    for result in results:
        order.setdefault((result.op, result.layout), len(order))
    modes = list(dict.fromkeys(result.mode for result in results))

    def place(result: "Result") -> tuple[int, int]:
        return order[result.op, result.layout], modes.index(result.mode)

    for _, members in groupby(sorted(results, key=place), place):
        group = list(members)
        yield {
            "op": group[0].op,
            "layout": group[0].layout,
            "mode": group[0].mode,
            "cases": len(group),
            "fused_vs_reference": max(result.fused_vs_reference for result in group),
            "fused_vs_float64": max(result.fused_vs_float64 for result in group),
            "reference_vs_float64": max(result.reference_vs_float64 for result in group),
            "bound": _bound(group),
            "ok": all(result.ok for result in group),
        }


def _bound(group: "list[Result]") -> str:
    """Returns the bounds of a group's cases as a range, since a case that sums up more terms has a larger bound."""
    if all(math.isfinite(result.fused_vs_reference_bound) for result in group):
        return _range([result.fused_vs_reference_bound for result in group])
    slack = [result.fused_vs_float64_bound - 2 * result.reference_vs_float64 for result in group]
    finite = [value for value in slack if math.isfinite(value)]
    return f"2r + {_range(finite)}" if finite else ""


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}..{high}"


def _print(groups: list[dict[str, Any]], results: "list[Result]", place: str) -> None:
    rows = table(
        title=f"Fused ops on {place.strip('/')}: largest errors, in ulp of the summed magnitude",
        caption="fused-ref: error of the fused op against the reference. fused-f64, ref-f64: of each against float64.\n"
        "bound: for fused-ref; in half precision for fused-f64, where r is ref-f64. ref-f64 has a bound too.",
    )
    for name in ("op", "dtype, layout", "mode"):
        rows.add_column(name, no_wrap=True)
    for name in ("cases", "fused-ref", "fused-f64", "ref-f64"):
        rows.add_column(name, justify="right")
    rows.add_column("bound", justify="right")
    rows.add_column("")
    for group in groups:
        rows.add_row(
            group["op"],
            group["layout"],
            group["mode"],
            str(group["cases"]),
            *(_number(group[key]) for key in ("fused_vs_reference", "fused_vs_float64", "reference_vs_float64")),
            group["bound"],
            "[green]OK[/]" if group["ok"] else "[bold red]FAIL[/]",
        )
    screen = console()
    screen.print(rows)
    failed = [result for result in results if not result.ok]
    if not failed:
        screen.print(f"[green]All {len(results)} results are within their bounds.[/]")
        return
    worst = max(failed, key=lambda result: (result.excess, result.fused_vs_reference))
    screen.print(f"[bold red]{len(failed)} of {len(results)} results are over their bounds.[/] The worst:")
    screen.print(escape(f"{worst.op}, {worst.layout}, {worst.mode}: {worst.case}"))
    if worst.problem is not None:
        screen.print(escape(worst.problem))
    if worst.where:
        screen.print(escape(worst.where))


def _number(error: float) -> str:
    return f"{error:.3g}" if math.isfinite(error) else "inf"


def _as_json(value: Any) -> Any:
    """Replaces infinity, which JSON lacks: null for a bound that does not apply, the word for an error."""
    if isinstance(value, dict):
        return {
            key: None if key.endswith("_bound") and item == math.inf else _as_json(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
