"""Counts what a training step makes a GPU do beside the model's own work, from graphs alone: no GPU is needed.

    python benchmarks/gpu/count_launches.py [MODEL...]

For each model and mode: launches, tensors that go to the GPU, and tensors that the host waits for. A loop's body counts
once. Waits within Keras's own operations are those of plain Keras's line.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import placement
import tensorflow as tf

import accumops
from accumops.training import train_function

Model = Callable[[], keras.Model]


def mlp() -> keras.Model:
    """Three layers."""
    layers = keras.layers
    return keras.Sequential([keras.Input((16,)), *(layers.Dense(32, "relu") for _ in range(2)), layers.Dense(10)])


def resnet() -> keras.Model:
    """ResNet50 with replaced normalization, on small pictures."""
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None)
    return accumops.replace_batchnorm_layers(model)


def transformer() -> keras.Model:
    """Two blocks of a language model."""
    layers = keras.layers
    tokens = keras.Input((12,), dtype="int32")
    x = layers.Embedding(50, 16)(tokens)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True))
        x = layers.LayerNormalization()(x + layers.Dense(16)(layers.Dense(32, "gelu")(x)))
    return keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


MODELS: dict[str, Model] = {"MLP": mlp, "ResNet50": resnet, "transformer": transformer}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batches(model: keras.Model) -> tf.data.Dataset:
    """Batches of 8 samples."""
    shape = model.inputs[0].shape[1:]
    x = np.zeros((16, *shape), model.inputs[0].dtype)
    return tf.data.Dataset.from_tensor_slices((x, np.zeros(16, "int32"))).batch(8).repeat()


def signature_of(model: keras.Model) -> tuple[tf.TensorSpec, tf.TensorSpec]:
    """Batches of any number of samples."""
    x, y = next(iter(batches(model)))
    return tuple(tf.TensorSpec([None, *each.shape[1:]], each.dtype) for each in (x, y))


def forward_and_backward(model: Model) -> Iterator[tuple[str, Any]]:
    """What no way to train can leave out."""
    built = model()

    def run(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = LOSS(y, built(x, training=True))
        return tape.gradient(loss, built.trainable_variables)

    yield "forward and backward", tf.function(run, autograph=False).get_concrete_function(*signature_of(built))


def plain(model: Model) -> Iterator[tuple[str, Any]]:
    """Keras's own step."""
    built = model()
    built.compile("adam", LOSS, jit_compile=False)
    built.optimizer.build(built.trainable_variables)
    batch = next(iter(batches(built)))
    built.compute_loss(y=batch[1], y_pred=built(batch[0]))
    step = tf.function(built.train_step, autograph=False)
    yield "plain Keras", step.get_concrete_function(signature_of(built))


def wrapped(
    model: Model,
    *,
    clip: float | None = None,
    scaled: bool = False,
    nonfinite: str = "propagate",
    norms: bool = False,
    noise: bool = False,
    together: int = 1,
    **mode: int,
) -> Iterator[tuple[str, Any]]:
    """The functions that `fit` calls."""
    wrapper = accumops.GradientAccumulateModel(model(), nonfinite=nonfinite, **mode)
    adam = keras.optimizers.Adam(global_clipnorm=clip)
    wrapper.compile(
        keras.optimizers.LossScaleOptimizer(adam) if scaled else adam,
        LOSS,
        jit_compile=False,
        steps_per_execution=together,
    )
    if norms:
        wrapper.optimizer.accumulator.track_norms()
    if noise:
        wrapper.optimizer.accumulator.track_noise()
    dataset = batches(wrapper.model)
    wrapper.fit(dataset, steps_per_epoch=together, verbose=0)
    options = {
        "clipped": clip,
        "losses scaled": scaled,
        f"non-finite: {nonfinite}": nonfinite != "propagate",
        "norms of variables": norms,
        "noise scale": noise,
        "several steps": together > 1,
    }
    for ends, function in functions_of(wrapper, dataset):
        way = next(iter(mode))
        name = ", ".join([way, *(option for option, is_on in options.items() if is_on)])
        yield f"{name}{'' if ends is None else ', ends the window' if ends else ', micro-batch'}", function


def functions_of(wrapper: Any, dataset: tf.data.Dataset) -> Iterator[tuple[bool | None, Any]]:
    """The function of a step, for each way in which it may end a window."""
    made: dict[Any, Any] = {}

    class Noted(train_function._FunctionOfIterators):
        def __init__(self, run: Any, *, fixed: bool) -> None:
            made[run.args[0] if run.args else "loop"] = run
            super().__init__(run, fixed=fixed)

    original = train_function._FunctionOfIterators
    train_function._FunctionOfIterators = Noted  # type: ignore[misc]
    try:
        train_function.train_function(wrapper, lambda iterator: {})
    finally:
        train_function._FunctionOfIterators = original  # type: ignore[misc]
    several = wrapper.steps_per_execution > 1
    for ends in (None,) if wrapper.micro_batch_size or several else (False, True):
        function = tf.function(made["loop" if several else ends], autograph=False)
        yield ends, function.get_concrete_function(iter(dataset))


def loop(model: Model, *, norms: bool = False) -> Iterator[tuple[str, Any]]:
    """A step of a loop of one's own."""
    built = model()
    variables = built.trainable_variables
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(), accum_steps=4)
    optimizer.jit_compile = False
    if norms:
        optimizer.accumulator.track_norms()
    optimizer.build(variables)

    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = LOSS(y, built(x, training=True))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    name = "a loop of one's own" + (", norms of variables" if norms else "")
    yield name, tf.function(step, autograph=False).get_concrete_function(*signature_of(built))


def steps(model: Model) -> Iterator[tuple[str, Any]]:
    """All ways to train."""
    yield from forward_and_backward(model)
    yield from plain(model)
    yield from wrapped(model, accum_steps=4)
    yield from wrapped(model, micro_batch_size=4)
    yield from wrapped(model, micro_batch_size=4, clip=1.0)
    yield from wrapped(model, micro_batch_size=4, scaled=True)
    for nonfinite in ("skip", "drop"):
        yield from wrapped(model, accum_steps=4, nonfinite=nonfinite)
    yield from loop(model)
    yield from wrapped(model, accum_steps=4, norms=True)
    yield from wrapped(model, micro_batch_size=4, norms=True)
    yield from loop(model, norms=True)
    yield from wrapped(model, accum_steps=4, noise=True)
    yield from wrapped(model, micro_batch_size=4, noise=True)
    yield from wrapped(model, accum_steps=4, together=3)
    yield from wrapped(model, micro_batch_size=4, together=3)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="by default all")
    placement.two_devices()
    print("| model | step | launches | to the GPU | waits |\n|---|---|---|---|---|")
    for name in parser.parse_args().models or MODELS:
        with tf.device(placement.GPU):
            for step, function in steps(MODELS[name]):
                found = placement.placed(function)
                launches = sum(found.launches.values())
                print(f"| {name} | {step} | {launches} | {len(found.uploads)} | {len(found.waits)} |", flush=True)


if __name__ == "__main__":
    main()
