"""`accumops demo`: trains with the full batch and with accumulated micro-batches, and compares the two."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from accumops.cli.console import console, human_bytes, table
from accumops.cli.picture import check_picture
from accumops.cli.quiet import import_tensorflow

_BATCH = 256
_MICRO_BATCH = 32
_ACCUM_STEPS = _BATCH // _MICRO_BATCH
_TRAINING_SAMPLES = 6 * _BATCH  # whole windows; the rest of the 1797 samples is the test set
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class _Data:
    x: Any
    y: Any
    x_test: Any
    y_test: Any


@dataclass(frozen=True)
class _Run:
    name: str
    losses: Any  # an array with one loss for each update
    weights: list[Any]
    accuracy: float
    seconds: float
    accumulator_bytes: int
    layer_output_bytes: int


@click.command()
@click.option("--updates", type=click.IntRange(min=1), default=120, help="Updates in each run.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("accumops-demo.png"),
    callback=check_picture,
    help="Save the picture of the loss curves in this file.",
)
def demo(updates: int, output: Path) -> None:
    """Train on a full batch and on accumulated micro-batches, and compare.

    A small convolutional network learns scikit-learn's handwritten digits. One run takes batches of 256 in plain Keras.
    The others take 8 micro-batches of 32 through GradientAccumulateOptimizer. All runs see the same samples in the same
    order.
    """
    with _extras():
        import matplotlib.figure  # noqa: F401  if it is missing, fail before the training

        data = _load_digits(updates)
    import_tensorflow()
    from accumops.verification import fused_problem

    on_gpu = _has_gpu()
    problem = fused_problem("gpu" if on_gpu else "cpu")
    plan: list[tuple[str, str | None]] = [("full batch", None), ("accumulated, fused", "fused")]
    if problem is not None:
        plan.pop()
    plan.append(("accumulated, reference", "reference"))
    runs = _train_all(plan, data, updates)
    if problem is not None:
        click.echo(f"The fused run is skipped: {problem}.")
    _print(runs, updates)
    try:
        _draw(runs, output)
    except OSError as error:
        raise click.FileError(str(output), error.strerror) from error
    click.echo(f"Loss curves saved to {output}")


@contextlib.contextmanager
def _extras() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise click.ClickException(
            f"the demo needs scikit-learn and matplotlib ({error}): pip install 'accumops[demo]'"
        ) from error


def _load_digits(updates: int) -> _Data:
    """Loads the digits, with the training samples repeated in the order in which every run sees them."""
    import numpy as np
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    shuffled = rng.permutation(len(images))
    images, labels = images[shuffled].reshape(-1, 8, 8, 1).astype("float32") / 16, labels[shuffled]
    epochs = math.ceil(updates * _BATCH / _TRAINING_SAMPLES)
    order = np.concatenate([rng.permutation(_TRAINING_SAMPLES) for _ in range(epochs)])[: updates * _BATCH]
    return _Data(images[order], labels[order], images[_TRAINING_SAMPLES:], labels[_TRAINING_SAMPLES:])


def _has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _train_all(plan: list[tuple[str, str | None]], data: _Data, updates: int) -> list[_Run]:
    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    initial = _new_model().get_weights()
    runs = []
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        for name, backend in plan:
            task = bar.add_task(name, total=len(data.x))

            def advance(samples: int, task: Any = task) -> None:
                bar.advance(task, samples)

            runs.append(_train(name, backend, initial, data, updates, advance))
    return runs


def _train(
    name: str, backend: str | None, initial: list[Any], data: _Data, updates: int, advance: Callable[[int], None]
) -> _Run:
    """Trains from the `initial` weights: with accumulation if there is a `backend`, else in plain Keras."""
    import keras
    import numpy as np

    from accumops import GradientAccumulateOptimizer, verification

    model = _new_model()
    model.set_weights(initial)
    optimizer = keras.optimizers.Adam(_LEARNING_RATE)
    if backend is not None:
        optimizer = GradientAccumulateOptimizer(optimizer, accum_steps=_ACCUM_STEPS)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    batch_size = _BATCH if backend is None else _MICRO_BATCH
    losses: list[float] = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            self.model.reset_metrics()  # or the loss would be a running mean

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            losses.append(float((logs or {})["loss"]))
            advance(batch_size)

    with verification.backend(backend) if backend else contextlib.nullcontext():
        start = time.perf_counter()
        model.fit(data.x, data.y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[Record()])
        seconds = time.perf_counter() - start
    accumulators = [] if backend is None else optimizer.accumulator.accumulators
    predictions = np.argmax(model.predict(data.x_test, verbose=0), axis=-1)
    return _Run(
        name=name,
        losses=np.reshape(losses, [updates, -1]).mean(axis=1),
        weights=model.get_weights(),
        accuracy=float(np.mean(predictions == data.y_test)),
        seconds=seconds,
        accumulator_bytes=sum(accumulator.numpy().nbytes for accumulator in accumulators),
        layer_output_bytes=4 * batch_size * sum(math.prod(layer.output.shape[1:]) for layer in model.layers),
    )


def _new_model() -> Any:
    import keras

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", kernel_initializer=keras.initializers.HeNormal(seed=1)),
            keras.layers.Conv2D(32, 3, activation="relu", kernel_initializer=keras.initializers.HeNormal(seed=2)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax", kernel_initializer=keras.initializers.GlorotUniform(seed=3)),
        ]
    )


def _print(runs: list[_Run], updates: int) -> None:
    rows = table(
        title=f"A batch of {_BATCH} against {_ACCUM_STEPS} micro-batches of {_MICRO_BATCH}",
        caption="Difference: the largest over all weights, relative to the largest weight of the same tensor.\n"
        "Seconds include tracing. Layer outputs: their size for one batch or one micro-batch.",
    )
    rows.add_column("run", no_wrap=True)
    for name in ("updates", "difference to full batch", "test accuracy", "seconds", "accumulators", "layer outputs"):
        rows.add_column(name, justify="right")
    for run in runs:
        rows.add_row(
            run.name,
            str(updates),
            "" if run is runs[0] else f"{_difference(run.weights, runs[0].weights):.1e}",
            f"{run.accuracy:.1%}",
            f"{run.seconds:.1f}",
            human_bytes(run.accumulator_bytes),
            human_bytes(run.layer_output_bytes),
        )
    console().print(rows)


def _difference(weights: list[Any], others: list[Any]) -> float:
    import numpy as np

    pairs = zip(weights, others, strict=True)
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), np.finfo(b.dtype).tiny)) for a, b in pairs)


def _draw(runs: list[_Run], output: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    from matplotlib.ticker import MaxNLocator

    # The curves coincide, so each is thinner than the curves below it.
    styles: list[dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 7, "solid_capstyle": "round"},
        {"color": "#08519c", "linewidth": 2.2},
        {"color": "#f16913", "linewidth": 2.2, "linestyle": (0, (1, 2.5)), "dash_capstyle": "round"},
    ]
    if len(runs) == 2:  # the fused run was skipped
        styles.pop(1)
    labels = [f"batch of {_BATCH}, plain Keras"]
    labels += [f"{_ACCUM_STEPS} x {_MICRO_BATCH} {run.name}" for run in runs[1:]]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for run, label, style in zip(runs, labels, styles, strict=True):
        updates = range(1, len(run.losses) + 1)
        axes.plot(updates, run.losses, label=label, marker="o" if len(run.losses) == 1 else None, **style)
    axes.set_title("Accumulated micro-batches train like the full batch")
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=150)
