"""The `update` suite: AdamW's step for ResNet-50's variables, compared with Keras, TensorFlow and memory's limit."""

import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from accumops import ops
from accumops.benchmark.accumulate import resnet50_shapes
from accumops.benchmark.bandwidth import Bandwidth
from accumops.benchmark.contender import Contender, in_one_graph, time_contenders
from accumops.benchmark.result import Result
from accumops.verification import backend

CASE = "AdamW"
ROUNDS = 30
WARMUP = 3
UPDATES = 4  # in one graph
# Bytes a value. It reads the gradient's sum, the value and its two slots, and writes the value and its slots.
_BYTES = 28
_RATE, _DECAY, _BETA_1, _BETA_2, _EPSILON = 1e-3, 4e-3, 0.9, 0.999, 1e-7


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return 1 + WARMUP + rounds


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Measures updates from existing gradients. Each contender has variables and slots of its own.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round.
    """
    shapes = resnet50_shapes()
    values = sum(math.prod(shape) for shape in shapes)
    bandwidth = Bandwidth(device)
    rows = time_contenders(
        CASE,
        contenders(shapes),
        device=device,
        rounds=rounds,
        warmup=WARMUP,
        progress=bandwidth.before(progress),
    )
    return Result(
        f"update: AdamW's step for {values / 1e6:.1f} million float32 values in {len(shapes)} variables",
        (*bandwidth.limits(CASE, _BYTES * values), *rows),
        (
            f"The limit is {_BYTES} bytes a value at a triad's bandwidth. The last gradient folded in moves 4 more, "
            "and saves accumulating it, which moves 12.",
            "ResourceApplyAdam is Adam: it has no weight decay.",
        ),
        settings={"values": values, "variables": len(shapes)},
        bandwidth=bandwidth.best,
    )


def contenders(shapes: Sequence[tuple[int, ...]]) -> list[Contender]:
    """Returns the contenders, for variables of these shapes."""
    rng = np.random.default_rng(0)

    def new_variables() -> list[tf.Variable]:
        return [tf.Variable(1e-2 * rng.standard_normal(shape, np.float32)) for shape in shapes]

    def zeros() -> list[tf.Variable]:
        return [tf.Variable(tf.zeros(shape)) for shape in shapes]

    values = sum(math.prod(shape) for shape in shapes)
    sums, latest = new_variables(), new_variables()

    def accumops(name: str, fold: bool = False) -> Callable[[], object]:
        variables, slots = new_variables(), [zeros(), zeros()]

        def step() -> None:
            ops.update(
                "adam",
                variables,
                slots,
                accumulators=sums,
                latest=[gradient.read_value() for gradient in latest] if fold else None,
                rate=_RATE,
                decay=_RATE * _DECAY,
                beta_1=_BETA_1,
                beta_2=_BETA_2,
                epsilon=_EPSILON,
            )

        run = in_one_graph(lambda: UPDATES * [step])
        with backend(name):
            run()  # traces, so that the function keeps this backend
        return run

    def keras_adamw(jit_compile: bool) -> Callable[[], object]:
        variables = [keras.Variable(variable.numpy()) for variable in new_variables()]
        optimizer = keras.optimizers.AdamW(_RATE, _DECAY, _BETA_1, _BETA_2, _EPSILON)
        optimizer.build(variables)

        @tf.function(jit_compile=jit_compile)
        def step() -> None:
            optimizer.apply([gradient.read_value() for gradient in sums], variables)

        return in_one_graph(lambda: UPDATES * [step])

    def resource_apply_adam() -> Callable[[], object]:
        variables, means, variances = new_variables(), zeros(), zeros()

        def step() -> None:
            for variable, mean, variance, gradient in zip(variables, means, variances, sums, strict=True):
                tf.raw_ops.ResourceApplyAdam(
                    var=variable.handle,
                    m=mean.handle,
                    v=variance.handle,
                    beta1_power=_BETA_1,
                    beta2_power=_BETA_2,
                    lr=_RATE,
                    beta1=_BETA_1,
                    beta2=_BETA_2,
                    epsilon=_EPSILON,
                    grad=gradient.read_value(),
                )

        return in_one_graph(lambda: UPDATES * [step])

    def contender(name: str, prepare: Callable[[], Callable[[], object]], bytes_a_value: int = _BYTES) -> Contender:
        return Contender(name, prepare, bytes_moved=bytes_a_value * values, times=UPDATES)

    return [
        contender("fused", lambda: accumops("fused")),
        contender("fused, last gradient folded in", lambda: accumops("fused", fold=True), _BYTES + 4),
        contender("reference", lambda: accumops("reference")),
        contender("keras.optimizers.AdamW", lambda: keras_adamw(jit_compile=False)),
        contender("keras.optimizers.AdamW, XLA", lambda: keras_adamw(jit_compile=True)),
        contender("ResourceApplyAdam a variable", resource_apply_adam),
    ]
