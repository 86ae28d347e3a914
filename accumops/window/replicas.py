"""Windows under a mirroring strategy of `tf.distribute`.

Each replica sums its own gradients. Where a window ends, the sums are added up over the replicas, once.

Replicas cannot communicate inside a `tf.cond`, but a `tf.cond` can run inside a merge call. So every step enters the
merge call (`across_replicas`), and decides there whether the window ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.tensorflow import components_of, distribution_of, replicas_cannot_merge
from accumops.arguments import name_of
from accumops.ops.variables import tf_variable

Result = TypeVar("Result")

_MIRRORING = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def strategy_of(variables: Sequence[tf.Variable | keras.Variable], who: str) -> tf.distribute.Strategy | None:
    """Returns the mirroring strategy that distributes variables, or None if they are on one device.

    Args:
        variables: The variables.
        who: The name of what asks, for messages.

    Raises:
        ValueError: If the strategy is not known to work, if it does not distribute all of the variables, or in a
            function that `strategy.run` calls, where nothing can be created.
    """
    current = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    if current is not None and not isinstance(current, (*_MIRRORING, tf.distribute.OneDeviceStrategy)):
        raise ValueError(
            f"{who} does not work under {type(current).__name__}: use MirroredStrategy, MultiWorkerMirroredStrategy, "
            "OneDeviceStrategy or none."
        )
    strategy = mirroring(current)
    for variable in variables:
        own = strategy_of_variable(variable)
        if strategy is None and own is not None:
            if not isinstance(own, _MIRRORING):
                raise ValueError(
                    f"{who} does not work under {type(own).__name__}, which '{name_of(variable)}' is of: use "
                    "MirroredStrategy, MultiWorkerMirroredStrategy, OneDeviceStrategy or none."
                )
            strategy = own
        if own is not strategy:
            raise ValueError(
                f"'{name_of(variable)}' is not a variable of the {type(strategy).__name__} that {who} is built "
                "under: create model, optimizer and accumulator within one `strategy.scope()`."
            )
    if strategy is not None and not tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
        raise ValueError(
            f"{who} is not built, and cannot be in a function that `strategy.run` calls: call "
            "`build(model.trainable_variables)` before, within `strategy.scope()`."
        )
    return strategy


def mirroring(strategy: tf.distribute.Strategy | None) -> tf.distribute.Strategy | None:
    """The strategy, if it is a mirroring one."""
    return strategy if isinstance(strategy, _MIRRORING) else None


def running() -> tf.distribute.Strategy | None:
    """The mirroring strategy of the replica that runs; None outside of replicas, and if there is only one."""
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    strategy = mirroring(tf.distribute.get_strategy())
    return strategy if strategy is not None and strategy.num_replicas_in_sync > 1 else None


def spreads(layer: keras.layers.Layer) -> bool:
    """Whether a layer is on several replicas of a mirroring strategy, or would be if it were built now."""
    strategy = tf.distribute.get_strategy()
    if layer.variables:
        strategy = strategy_of_variable(layer.variables[0])
    return mirroring(strategy) is not None and strategy.num_replicas_in_sync > 1


def components(*variables: tf.Variable | keras.Variable) -> list[list[tf.Variable]]:
    """The components of variables on the replica that runs; outside of replicas, on each of this process's replicas.

    Returns:
        For each of these replicas, the components of all variables.
    """
    values = [tf_variable(variable) for variable in variables]
    count = max((len(components_of(value)) for value in values), default=1)
    replicas = range(count) if running() is None else [local_replica()]
    return [[own(value, replica) for value in values] for replica in replicas]


def spans_processes(strategy: tf.distribute.Strategy | None) -> bool:
    """Whether other processes have replicas of the strategy too."""
    if strategy is None or mirroring(strategy) is None:
        return False
    return bool(strategy.num_replicas_in_sync > len(strategy.extended.worker_devices))


def run(strategy: tf.distribute.Strategy, step: Callable[[Any], dict[str, Any]], data: Any) -> dict[str, Any]:
    """Runs a step on each replica, and returns the means of its logs over this process's replicas.

    The replicas do not communicate for it.
    """

    def mean(value: Any) -> tf.Tensor:
        return tf.reduce_mean(tf.stack(strategy.experimental_local_results(value)), axis=0)

    def run_one(share: Any) -> dict[str, tf.Tensor]:
        return {name: tf.convert_to_tensor(value) for name, value in step(share).items()}  # a result may be a variable

    return {name: mean(value) for name, value in strategy.run(run_one, args=(data,)).items()}


def check_agreement(strategy: tf.distribute.Strategy, what: dict[str, int]) -> None:
    """Raises, in all processes of a strategy, if they do not agree on numbers.

    Args:
        strategy: The strategy.
        what: The numbers of this process, by their names in the message.
    """
    everyone = gather_from_processes(strategy, list(what.values()))
    if (everyone != everyone[0]).any():
        each = "; ".join(", ".join(f"{name} {n}" for name, n in zip(what, row, strict=True)) for row in everyone)
        raise RuntimeError(
            f"The processes of the {type(strategy).__name__} do not go on from the same point: {each}. Restore the "
            "same backup in all of them."
        )


def gather_from_processes(strategy: tf.distribute.Strategy, numbers: Sequence[int]) -> np.ndarray:
    """Returns numbers of all processes of a strategy: a row for each replica. All processes wait for it together.

    Args:
        strategy: The strategy.
        numbers: The numbers of this process. All processes give equally many.
    """
    mine = tf.constant([list(numbers)], tf.int64)

    @tf.function(autograph=False)
    def gather() -> tf.Tensor:
        return strategy.gather(strategy.run(tf.identity, args=(mine,)), axis=0)

    return gather().numpy()


def first_share(strategy: tf.distribute.Strategy, batch: Any) -> Any:
    """The part of a batch that the first of this process's replicas gets."""
    return keras.tree.map_structure(lambda leaf: strategy.experimental_local_results(leaf)[0], batch)


def strategy_of_variable(variable: tf.Variable | keras.Variable) -> tf.distribute.Strategy | None:
    """The strategy that distributes a variable, or None."""
    return distribution_of(tf_variable(variable))


def check_in_replica(strategy: tf.distribute.Strategy, what: str) -> None:
    """Raises what the user should read if no replica of the strategy runs."""
    if tf.distribute.in_cross_replica_context() or tf.distribute.get_strategy() is not strategy:
        raise ValueError(
            f"{what} takes what a replica has: call it in a function that `strategy.run` calls, of the "
            f"{type(strategy).__name__} that it was built under."
        )


def check_in_graph(what: str) -> None:
    """Raises in eager execution, where TensorFlow mixes up collective operations of several dtypes and shapes."""
    if tf.executing_eagerly():
        raise ValueError(
            f"Under {type(tf.distribute.get_strategy()).__name__} {what}, ends in graphs only: leave out "
            "`run_eagerly=True`, or run the step in a `tf.function`."
        )


def across_replicas(strategy: tf.distribute.Strategy, function: Callable[[], Any]) -> None:
    """Calls a function once, outside of the replicas. Where all replicas call this, they wait for it together.

    Raises:
        ValueError: Under another strategy, or where XLA compiles what a replica runs.
    """
    if not tf.distribute.has_strategy():
        with strategy.scope():
            function()
        return
    if tf.distribute.get_strategy() is not strategy:
        raise ValueError(
            f"This was built under another strategy than the {type(tf.distribute.get_strategy()).__name__} that it is "
            "called under: create model, optimizer and accumulator within one `strategy.scope()`."
        )
    if tf.distribute.in_cross_replica_context():
        function()
        return
    if replicas_cannot_merge():
        raise ValueError(
            f"Under {type(strategy).__name__} a window cannot end in a function that XLA compiles: use "
            "`jit_compile=False`."
        )
    tf.distribute.get_replica_context().merge_call(lambda unused: function())


def on_each_replica(strategy: tf.distribute.Strategy, function: Callable[[], Result]) -> list[Result]:
    """Calls a function on each of this process's replicas, and returns what each returned.

    Each replica has a thread. Threads take turns, and switch only where the function communicates: until then it is
    alone with Python's state.
    """
    results: dict[int, Result] = {}

    def run() -> None:
        results[local_replica()] = function()

    strategy.extended.call_for_each_replica(run)
    return [results[i] for i in sorted(results)]


def local_replica() -> int:
    """The number of the replica that runs, among those of this process."""
    context = tf.distribute.get_replica_context()
    replica = int(tf.get_static_value(context.replica_id_in_sync_group))
    return replica % len(context.strategy.extended.worker_devices)


def replica_ids(strategy: tf.distribute.Strategy) -> list[int]:
    """The numbers of this process's replicas among those of all."""
    with strategy.scope():
        return on_each_replica(
            strategy,
            lambda: int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)),
        )


def sum_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Sums tensors of a replica with those of all others: one collective operation for each dtype, in a graph."""
    context = tf.distribute.get_replica_context()
    with tf.device(context.strategy.extended.worker_devices[local_replica()]):
        tensors = [tf.identity(tensor) for tensor in tensors]  # each says where it is
    sums: dict[int, tf.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [tensors[i] for i in chosen])
        sums.update(zip(chosen, reduced, strict=True))
    return [sums[i] for i in range(len(tensors))]


def own(variable: tf.Variable | keras.Variable, replica: int | None = None) -> tf.Variable:
    """Returns a variable's component on one of this process's replicas, by default the one that runs.

    A variable that no mirroring strategy distributes is returned as it is.
    """
    value = tf_variable(variable)
    if not isinstance(value, tf.distribute.DistributedValues):
        return value
    return components_of(value)[local_replica() if replica is None else replica]
