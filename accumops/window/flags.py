"""Windows of a graph that knows only when it runs whether a micro-batch ends one: by flags of the ops.

A condition takes time for each tensor that goes through it, and the end of a window uses all gradients, accumulators,
variables and slots. So these stay outside:

    `ops.accumulate(only_if=)`          unless the micro-batch makes the window full, if an update takes its gradients
    the update of the window            where it does, by a flag as well
    counters                            count the micro-batch
    a condition, where it does          closes the window: counters and members, such as batch normalization, go through
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from accumops.window.micro_batch import CountedMicroBatch, Window
from accumops.window.nonfinite import MAKES_UPDATE
from accumops.window.recorded_operations import Recording
from accumops.window.state import WindowState


def end_if_full(
    state: WindowState, batch: CountedMicroBatch, update: Callable[[Window], Callable[[], None]], *, folds: bool
) -> None:
    """Adds a micro-batch, and ends the window where that makes it full.

    Args:
        state: The state of the window, which propagates gradients that are not finite, and notes nothing.
        batch: The micro-batch, with a gradient for each variable.
        update: Is called with the window as it is if it is full. It makes the update where `batch.fills` is true, and
            returns what is left to be done there.
        folds: Whether the update adds a full window's last dense gradients. Otherwise they are in the accumulators, and
            their addition reports norms.
    """
    state.last_slice.clear()
    dense = [i for i, each in enumerate(batch.gradients) if not isinstance(each, tf.IndexedSlices)]
    latest = {i: batch.gradients[i] for i in dense} if folds else {}
    with state.counters.place():
        stays_open = ~batch.fills
    with Recording() as changes:
        with Recording() as accumulation:
            others = [i for i in range(len(batch.gradients)) if i not in latest]
            found = state.sum_gradients(batch, others, norms=False if folds else batch.fills)
            state.touched_rows.add(batch.gradients)
        state.sum_gradients(batch, latest, only_if=stays_open)
        state.connections.note(batch.present, batch.given)
        connected = state.connections.at_end(batch.present, batch.given)
        with tf.control_dependencies(accumulation.effects):
            finish = update(
                Window(
                    state.held(connected),
                    connected,
                    state.divisor(batch.total),
                    state.touched_rows,
                    latest,
                    batch.weight,
                    batch.starts,
                    reported=found.norms,
                )
            )

    def close() -> None:
        finish()
        state.close(MAKES_UPDATE)

    # The counters wait: a micro-batch that fails does not count.
    with tf.control_dependencies(changes.effects):
        state.weight.assign(batch.total)
        state.counters.add(batch.limit)
        keras.ops.cond(batch.fills, close, lambda: None)
