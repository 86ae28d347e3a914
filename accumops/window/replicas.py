"""What `tf.distribute` makes of a window: each replica sums gradients of its own, and where the window ends they are
summed over the replicas, once.

Under a mirroring strategy a condition cannot hold what replicas do together, but what they do together can hold a
condition: a window's end is entered first (`across_replicas`), and decided there.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras
import tensorflow as tf

from accumops.arguments import name_of
from accumops.ops.variables import tf_variable

Result = TypeVar("Result")

_MIRRORING = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def strategy_of(variables: Sequence[tf.Variable | keras.Variable], who: str) -> tf.distribute.Strategy | None:
    """Returns the mirroring strategy of variables, or None where they are on one device.

    Args:
        variables: The variables.
        who: What asks, for messages.

    Raises:
        ValueError: Under a strategy that is not known to work, where not all variables are of the same one, and in a
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
    """The mirroring strategy of whose replicas, two at least, one runs; None elsewhere."""
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    strategy = mirroring(tf.distribute.get_strategy())
    return strategy if strategy is not None and strategy.num_replicas_in_sync > 1 else None


def spreads(layer: keras.layers.Layer) -> bool:
    """Whether a layer is, or if it is not built now would be, on several replicas of a mirroring strategy."""
    strategy = tf.distribute.get_strategy()
    if layer.variables:
        strategy = strategy_of_variable(layer.variables[0])
    return mirroring(strategy) is not None and strategy.num_replicas_in_sync > 1


def components(*variables: tf.Variable | keras.Variable) -> list[list[tf.Variable]]:
    """Of variables those of the replica that runs; outside of replicas those of each of this process's replicas."""
    values = [tf_variable(variable) for variable in variables]
    count = max(
        (len(value.values) for value in values if isinstance(value, tf.distribute.DistributedValues)), default=1
    )
    replicas = range(count) if running() is None else [local_replica()]
    return [[own(value, replica) for value in values] for replica in replicas]


def spans_processes(strategy: tf.distribute.Strategy | None) -> bool:
    """Whether other processes have replicas of the strategy too."""
    if strategy is None or mirroring(strategy) is None:
        return False
    return bool(strategy.num_replicas_in_sync > len(strategy.extended.worker_devices))


def run(strategy: tf.distribute.Strategy, step: Callable[[Any], dict[str, Any]], data: Any) -> dict[str, Any]:
    """Runs a step on each replica; its logs are means over this process's replicas, without communication."""

    def mean(value: Any) -> tf.Tensor:
        return tf.reduce_mean(tf.stack(strategy.experimental_local_results(value)), axis=0)

    def run_one(share: Any) -> dict[str, tf.Tensor]:
        return {name: tf.convert_to_tensor(value) for name, value in step(share).items()}  # a result may be a variable

    return {name: mean(value) for name, value in strategy.run(run_one, args=(data,)).items()}


def check_agreement(strategy: tf.distribute.Strategy, what: dict[str, int]) -> None:
    """Raises, in all processes of a strategy, if they do not agree on numbers.

    Args:
        strategy: The strategy.
        what: The numbers of this process, by what they are in the message.
    """
    mine = tf.constant([list(what.values())], tf.int64)

    @tf.function(autograph=False)
    def gather() -> tf.Tensor:
        return strategy.gather(strategy.run(tf.identity, args=(mine,)), axis=0)

    everyone = gather().numpy()
    if (everyone != everyone[0]).any():
        each = "; ".join(", ".join(f"{name} {n}" for name, n in zip(what, row, strict=True)) for row in everyone)
        raise RuntimeError(
            f"The processes of the {type(strategy).__name__} do not go on from the same point: {each}. Restore the "
            "same backup in all of them."
        )


def first_share(strategy: tf.distribute.Strategy, batch: Any) -> Any:
    """What the first of this process's replicas gets of a batch."""
    return keras.tree.map_structure(lambda leaf: strategy.experimental_local_results(leaf)[0], batch)


def strategy_of_variable(variable: tf.Variable | keras.Variable) -> tf.distribute.Strategy | None:
    """The strategy that a variable is spread by, or None."""
    value = tf_variable(variable)
    return value.distribute_strategy if isinstance(value, tf.distribute.DistributedValues) else None


def check_in_replica(strategy: tf.distribute.Strategy, what: str) -> None:
    """Raises what the user should read if no replica of the strategy runs."""
    if tf.distribute.in_cross_replica_context() or tf.distribute.get_strategy() is not strategy:
        raise ValueError(
            f"{what} takes what a replica has: call it in a function that `strategy.run` calls, of the "
            f"{type(strategy).__name__} that it was built under."
        )


def across_replicas(strategy: tf.distribute.Strategy, function: Callable[[], Any]) -> None:
    """Calls a function once, outside of the replicas; in a function that all replicas run, for all of them together.

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
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        raise ValueError(
            f"Under {type(strategy).__name__} a window cannot end in a function that XLA compiles: use "
            "`jit_compile=False`."
        )
    tf.distribute.get_replica_context().merge_call(lambda unused: function())


def on_each_replica(strategy: tf.distribute.Strategy, function: Callable[[], Result]) -> list[Result]:
    """Calls a function on each of this process's replicas, and returns what each returned.

    Threads take turns, so that what a function does to Python's state it does alone until it communicates.
    """
    results: dict[int, Result] = {}

    def run() -> None:
        results[local_replica()] = function()

    strategy.extended.call_for_each_replica(run)
    return [results[i] for i in sorted(results)]


def local_replica() -> int:
    """Which of this process's replicas runs."""
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
    """A variable's component on one of this process's replicas, by default the one that runs.

    A variable of no mirroring strategy is its own.
    """
    value = tf_variable(variable)
    if not isinstance(value, tf.distribute.DistributedValues):
        return value
    return value.values[local_replica() if replica is None else replica]
