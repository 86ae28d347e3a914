"""Times the contenders of a case, interleaved, and returns their rows."""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from accumops.benchmark.result import Row
from accumops.benchmark.timing import interleave, stopwatch
from accumops.planning.child_process import problem_text


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    name: str
    prepare: Callable[[], Callable[[], object]]  # makes the function that is timed
    bytes_moved: int | None = None
    floor: bool = False
    times: int = 1  # how often the timed function does the work


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
        case: The name of the case in the rows.
        contenders: The contenders. If one raises an error, its row says so.
        device: `"CPU"` or `"GPU"`. On a GPU a call may return before its work is done, so the device is synchronized.
        rounds: Timed runs of each contender.
        warmup: Untimed runs before these.
        progress: Called after each round, and once when all contenders are prepared.

    Returns:
        One row for each contender, in their order.
    """
    runs: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for contender in contenders:
        try:
            run = contender.prepare()
            run()  # traces, and lets XLA compile
        except Exception as error:  # any error of TensorFlow, Keras or XLA costs this row only
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
    """Returns a function that runs another one several times."""

    def run_all() -> None:
        for _ in range(times):
            run()

    return run_all


def in_one_graph(steps: Callable[[], Sequence[Callable[[], object]]]) -> Callable[[], object]:
    """Returns a `tf.function` of several steps: a call costs about a millisecond, however little the function does.

    Args:
        steps: Called while tracing. Returns one function for each step, which makes the step's ops.
    """

    @tf.function
    def run() -> None:
        # Each step waits for the one before. Otherwise TensorFlow takes each variable through all steps while the
        # variable is in the cache.
        barrier = tf.no_op()
        for step in steps():
            before = len(barrier.graph.get_operations())
            with tf.control_dependencies([barrier]):
                step()
            barrier = tf.group(*barrier.graph.get_operations()[before:])

    return run
