"""`accumops plan`: the micro-batch of a saved model that fits a memory limit."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accumops.cli.console import console, table
from accumops.cli.info import describe
from accumops.cli.picture import check_matplotlib, check_picture
from accumops.cli.report import json_option, write_json

if TYPE_CHECKING:
    from accumops import MicroBatchPlan


@click.command()
@click.argument("model_file", metavar="MODEL.keras", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--effective-batch-size",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Samples an update.",
)
@click.option("--memory-limit", metavar="SIZE", help="The most memory, such as 4GiB.  [default: what the device has]")
@click.option(
    "--input-shape",
    "shapes",
    multiple=True,
    metavar="[NAME=]D,D,…",
    help="The shape of an input that leaves it open, without the samples; once for each such input.",
)
@click.option("--recompute/--no-recompute", default=True, help="Whether to plan recompute.")
@click.option("--margin", type=click.FloatRange(0, 1, max_open=True), default=0.1, help="The part to leave free.")
@click.option("--optimizer", default="adam", help="The optimizer of a model that is saved without one.")
@json_option
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=check_picture,
    help="Draw memory and speed in this file; needs matplotlib.",
)
def plan(
    model_file: Path,
    effective_batch_size: int,
    memory_limit: str | None,
    shapes: tuple[str, ...],
    recompute: bool,
    margin: float,
    optimizer: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Find the micro-batch, and what to recompute, that train a saved model fastest within a memory limit.

    Measures forward and backward passes on zeros. A model that is saved without a loss gets a mean squared error.
    """
    if picture is not None:
        check_matplotlib()
    facts = describe()

    import keras

    import accumops

    screen = console(stderr=True)
    try:
        model = keras.models.load_model(model_file)
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(f"{model_file} cannot be loaded: {error}") from error
    if not model.compiled:
        try:
            model.compile(optimizer, "mse")
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--optimizer") from error
        screen.print(f"{model_file} has no loss and no optimizer: taking a mean squared error and '{optimizer}'.")
    data = _zeros(model, dict(_shape(each) for each in shapes))
    try:
        with screen.status("measuring"):
            found = accumops.find_micro_batch_size(
                model,
                data,
                effective_batch_size=effective_batch_size,
                memory_limit=int(memory_limit) if memory_limit and memory_limit.isdecimal() else memory_limit,
                recompute="auto" if recompute else False,
                margin=margin,
                verbose=0,
            )
    except (ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from error
    _print(found, model_file)
    if picture is not None:
        found.plot(picture)
        click.echo(f"Picture written to {picture}")
    if json_file is not None:
        entry = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        entry["measured"] = [dataclasses.asdict(each) for each in found.measured]
        write_json(json_file, {"accumops": facts, "model": str(model_file), "plan": entry})


def _print(found: "MicroBatchPlan", model_file: Path) -> None:
    lines = str(found).splitlines()
    rows = table(title=str(model_file), caption="\n".join([*lines[:2], *lines[lines.index("", 3) + 1 :]]))
    rows.add_column("micro-batch", justify="right")
    rows.add_column("recomputes")
    rows.add_column("memory, MiB", justify="right")
    rows.add_column("samples/s", justify="right")
    rows.add_column("")
    for each in found.measured:
        is_plan = each.micro_batch_size == found.micro_batch_size and each.recompute == found.recomputes
        memory = "over the limit" if each.memory is None else f"{each.memory / 2**20:.0f}"
        speed = "" if each.samples_per_second is None else f"{each.samples_per_second:.1f}"
        rows.add_row(str(each.micro_batch_size), each.recompute, memory, speed, "the plan" if is_plan else "")
    console().print(rows)


def _shape(text: str) -> tuple[str | None, tuple[int, ...]]:
    """The name and the shape of an input."""
    name, _, sizes = text.rpartition("=")
    try:
        return name or None, tuple(int(size) for size in sizes.split(",") if size.strip())
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not like 224,224,3 or tokens=128", param_hint="--input-shape") from error


def _zeros(model: Any, shapes: dict[str | None, tuple[int, ...]]) -> tuple[Any, Any]:
    """A sample of inputs and targets, as many as the model wants."""
    import keras
    import tensorflow as tf

    from accumops.adapters.keras_functional import graph_of, inputs_of

    if getattr(model, "inputs", None) is None:
        raise click.ClickException(
            f"'{model.name}' does not say what inputs it takes, as a functional model does. Use "
            "`accumops.find_micro_batch_size` with a batch of data."
        )

    def zeros_of(tensor: Any) -> Any:
        name = tensor.name
        shape = shapes.get(name, shapes.get(None) if len(model.inputs) == 1 else None) or tuple(tensor.shape[1:])
        fits = len(shape) == len(tensor.shape[1:]) and all(
            size in (None, given) for size, given in zip(tensor.shape[1:], shape, strict=True)
        )
        if not fits or None in shape:
            raise click.BadParameter(
                f"the input '{name}' has the shape {tuple(tensor.shape[1:])} without the samples: give sizes for it, "
                f"such as --input-shape {name}={','.join(str(size or 128) for size in tensor.shape[1:])}",
                param_hint="--input-shape",
            )
        return tf.zeros((1, *shape), tensor.dtype)

    unknown = {name for name in shapes if name is not None} - {tensor.name for tensor in model.inputs}
    if unknown:
        names = ", ".join(tensor.name for tensor in model.inputs)
        raise click.BadParameter(f"{sorted(unknown)} are no inputs of the model: {names}", param_hint="--input-shape")
    graph = graph_of(model)
    x = keras.tree.map_structure(zeros_of, model.inputs if graph is None else inputs_of(graph))
    y_pred = model(x, training=False)
    outputs, losses = keras.tree.flatten(y_pred), keras.tree.flatten(model.loss)
    losses = losses if len(losses) == len(outputs) else losses[:1] * len(outputs)
    targets = [_target(loss, output) for loss, output in zip(losses, outputs, strict=True)]
    return x, keras.tree.pack_sequence_as(y_pred, targets)


def _target(loss: Any, output: Any) -> Any:
    """Zeros as a target of a loss: labels for losses that take labels, else what the model outputs."""
    import tensorflow as tf

    name = loss if isinstance(loss, str) else getattr(loss, "name", type(loss).__name__)
    if "sparse" in str(name).lower():
        return tf.zeros(output.shape[:-1], tf.int32)
    return tf.zeros(output.shape, output.dtype)
