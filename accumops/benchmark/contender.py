"""What is timed: contenders of one case, interleaved, as rows."""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from accumops.benchmark.result import Row
from accumops.benchmark.timing import interleave, stopwatch


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do what a case is about."""

    name: str
    prepare: Callable[[], Callable[[], object]]  # makes what is timed
    bytes_moved: int | None = None
    floor: bool = False
    times: int = 1  # how often one run does it


def time_contenders(
    case: str,
    contenders: Sequence[Contender],
    *,
    device: str,
    rounds: int,
    warmup: int,
    progress: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Times all contenders, interleaved.

    Args:
        case: What the rows are named for.
        contenders: What to time. One that raises an error gets a row that says so.
        device: `"CPU"` or `"GPU"`, on which a call may return before the work is done.
        rounds: Timed runs of each contender.
        warmup: Untimed ones before.
        progress: Called after each round, and once when all is prepared.

    Returns:
        One row for each contender, in their order.
    """
    runs: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for contender in contenders:
        try:
            run = contender.prepare()
            run()  # traced, and compiled where XLA does
        except Exception as error:  # of any kind, from TensorFlow, Keras or XLA: it costs this row only
            notes[contender.name] = problem_text(error)
        else:
            runs[contender.name] = run
    progress()
    sample = stopwatch(tf.test.experimental.sync_devices if device == "GPU" else lambda: None)
    times = interleave(runs, sample=sample, rounds=rounds, warmup=warmup, progress=progress)
    rows = []
    for contender in contenders:
        row = Row(case, contender.name, bytes_moved=contender.bytes_moved, floor=contender.floor)
        if contender.name in notes:
            row = dataclasses.replace(row, note=notes[contender.name])
        else:
            seconds = times[contender.name]
            milliseconds = 1e3 * seconds.median / contender.times
            row = dataclasses.replace(row, milliseconds=milliseconds, spread=seconds.spread)
        rows.append(row)
    return rows


def repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    """A function that runs another one several times."""

    def run_all() -> None:
        for _ in range(times):
            run()

    return run_all


def in_one_graph(steps: Callable[[], Sequence[Callable[[], object]]]) -> Callable[[], object]:
    """A `tf.function` of several steps, since calling one costs about a millisecond however little is in it.

    Args:
        steps: Called when it is traced, for the functions that make each step's ops.
    """

    @tf.function
    def run() -> None:
        # One after another: left to itself, TensorFlow takes each variable through all steps, in the cache.
        barrier = tf.no_op()
        for step in steps():
            before = len(barrier.graph.get_operations())
            with tf.control_dependencies([barrier]):
                step()
            barrier = tf.group(*barrier.graph.get_operations()[before:])

    return run


def problem_text(error: BaseException) -> str:
    """An error as a note: its kind, and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
