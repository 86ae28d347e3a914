"""The kinds of models that people train, each in every way that accumops trains them, against the large batch.

A way that does not fit a kind of model says so. Models of keras-hub need `pip install keras-hub`.
"""

import functools
import re
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from kinds import BATCH, KINDS, MICRO, OWN_STEPS, RATE, SAMPLES, UPDATES, compile_arguments, language_model
from problems import RUNS

from accumops import GradientAccumulateModel, GradientAccumulateOptimizer, GradientAccumulator

STEPS = BATCH // MICRO
EVERY_KIND = {**KINDS, **OWN_STEPS}


def sgd():
    return keras.optimizers.SGD(RATE)


def kind_of(name):
    if name == "LowRankLanguageModel":
        pytest.importorskip("keras_hub")
    make = language_model() if name == "LowRankLanguageModel" else EVERY_KIND[name]
    return make(np.random.default_rng(zlib.crc32(name.encode())))


def batches(kind, size):
    """The data in batches of a size, eagerly."""
    for start in range(0, SAMPLES, size):
        yield part_of((kind.x, kind.y), slice(start, start + size))


def part_of(batch, samples):
    return keras.tree.map_structure(lambda each: None if each is None else tf.constant(each[samples]), batch)


@functools.cache
def large_batch(name, reduction="sum_over_batch_size"):
    """The weights that plain Keras trains on the large batch."""
    kind = kind_of(name)
    model = kind.model()
    rate = RATE if reduction == "sum_over_batch_size" else RATE / SAMPLES
    model.compile(**compile_arguments(kind, model, lambda: keras.optimizers.SGD(rate), reduction), run_eagerly=True)
    start = model.get_weights()
    fit(kind, model, BATCH)
    assert np.concatenate([np.ravel(a - b) for a, b in zip(start, model.get_weights(), strict=True)]).any()
    return model.get_weights()


def fit(kind, model, batch_size):
    model.fit(kind.x, kind.y, batch_size=batch_size, shuffle=False, verbose=0)


def agree(wanted, model):
    for expected, weight, variable in zip(wanted, model.get_weights(), model.weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=2e-5, err_msg=variable.path)


def wrapped_model(name, run, **mode):
    """`GradientAccumulateModel`."""
    kind = kind_of(name)
    net = kind.model()
    model = GradientAccumulateModel(net, **mode)
    model.compile(sgd(), kind.loss("sum_over_batch_size"), **RUNS[run])
    fit(kind, model, MICRO if "accum_steps" in mode else BATCH)
    assert int(model.optimizer.iterations) == UPDATES
    agree(large_batch(name), net)


def wrapped_optimizer(name, run):
    """`GradientAccumulateOptimizer` in `compile`; it knows no divisor, and so losses over positions are sums."""
    kind = kind_of(name)
    model = kind.model()
    sums = kind.counts_positions
    reduction, rate = ("sum", RATE / SAMPLES) if sums else ("sum_over_batch_size", RATE)

    def wrapped():
        return GradientAccumulateOptimizer(keras.optimizers.SGD(rate), STEPS, reduction="sum" if sums else "mean")

    model.compile(**compile_arguments(kind, model, wrapped, reduction), **RUNS[run])
    fit(kind, model, MICRO)
    assert int(model.optimizer.iterations) == UPDATES
    agree(large_batch(name, reduction), model)


def loop(name, run):
    """`GradientAccumulator` in a loop, with micro-batches of different sizes, and windows that end with the batch."""
    kind = kind_of(name)
    model = kind.model()
    model.compile(**compile_arguments(kind, model, sgd))
    variables, optimizer = model.trainable_variables, model.optimizer
    optimizer.build(variables)
    accumulator = GradientAccumulator(accum_steps=None)
    accumulator.build(variables, jit_compile=run == "xla")

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = (
                model.loss_of(x, y)
                if hasattr(model, "loss_of")
                else model.compute_loss(x=x, y=y, y_pred=model(x, training=True), training=True)
            )
        accumulator.accumulate(tape.gradient(loss, variables), weight=kind.divisor(x, y))

    if run != "eager":
        micro_step = tf.function(micro_step, jit_compile=run == "xla", reduce_retracing=True)
    for x, y in batches(kind, BATCH):
        for part in (slice(0, 3), slice(3, 6), slice(6, None)):
            micro_step(*part_of((x, y), part))
        optimizer.apply(accumulator.close(), variables)
    agree(large_batch(name), model)


WAYS = {
    "accum_steps": functools.partial(wrapped_model, accum_steps=STEPS),
    "micro_batch_size": functools.partial(wrapped_model, micro_batch_size=3),
    "optimizer": wrapped_optimizer,
    "loop": loop,
}
FITTING = {name: list(WAYS) for name in (*KINDS, "LowRankLanguageModel")}
FITTING |= {name: ["optimizer", "loop"] for name in OWN_STEPS} | {"Adversarial": ["optimizer"]}


def by_default(name, way, run):
    """One way of `GradientAccumulateModel` for each kind, in turn, or else the optimizer or a loop, in turn.

    One of the others meets the optimizer as well: its loss is over positions, so that the optimizer needs a sum.
    """
    turn = list(FITTING).index(name) % 2
    if way in ("accum_steps", "micro_batch_size"):
        return (way, run) == (("accum_steps", "eager"), ("micro_batch_size", "graph"))[turn]
    if name in OWN_STEPS:
        return run == "eager" and way == FITTING[name][turn % len(FITTING[name])]
    return (name, way, run) == ("Tagger", "optimizer", "eager")


@pytest.mark.parametrize(
    ("name", "way", "run"),
    [
        pytest.param(name, way, run, marks=() if by_default(name, way, run) else pytest.mark.exhaustive)
        for name, ways in FITTING.items()
        for way in ways
        for run in RUNS
    ],
)
@pytest.mark.some_by_default(2)
def test_the_large_batch(name, way, run):
    WAYS[way](name, run)


def test_gans_whose_networks_move_in_turn():
    """In a loop each network has a window of its own: the generator's starts when the discriminator has moved."""
    kind = kind_of("Adversarial")
    wanted, gan = kind.model(), kind.model()
    in_turn(wanted, [[x] for x, _ in batches(kind, BATCH)])
    starts = range(0, BATCH, MICRO)
    in_turn(gan, [[part_of(x, slice(at, at + MICRO)) for at in starts] for x, _ in batches(kind, BATCH)])
    agree(wanted.get_weights(), gan)


def in_turn(gan, windows):
    """Moves the discriminator by a window of micro-batches, then the generator by the same."""
    parts = [
        (gan.discriminator, gan.discriminator_loss, GradientAccumulateOptimizer(sgd(), None)),
        (gan.generator, lambda real, noise: gan.generator_loss(noise), GradientAccumulateOptimizer(sgd(), None)),
    ]
    for window in windows:
        for network, loss_of, optimizer in parts:
            variables = network.trainable_variables
            for real, noise in window:
                with tf.GradientTape() as tape:
                    loss = loss_of(real, noise)
                optimizer.apply(tape.gradient(loss, variables), variables)
            optimizer.flush()


@pytest.mark.parametrize("name", OWN_STEPS)
@pytest.mark.parametrize("mode", [{"accum_steps": 2}, {"micro_batch_size": 2}], ids=["accum_steps", "micro_batch_size"])
def test_models_with_a_step_of_their_own_say_to_wrap_the_optimizer(name, mode):
    model = kind_of(name).model()
    method = "compute_loss" if name == "Distillation" else "train_step"
    expected = rf"{type(model).__name__} has a `{method}` of its own.*GradientAccumulateOptimizer"
    with pytest.raises(ValueError, match=re.compile(expected)):
        GradientAccumulateModel(model, **mode)


@pytest.mark.parametrize(
    "method", ["fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"]
)
def test_models_with_a_loop_of_their_own_say_to_wrap_the_optimizer(method):
    own = type("Own", (keras.Model,), {method: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"Own has a `{method}` of its own.*GradientAccumulateOptimizer instead\.$"):
        GradientAccumulateModel(own(), accum_steps=2)


class TestClassifierOfKerasHub:
    """It takes strings: its `fit` runs its preprocessor."""

    TEXTS = np.array(["the cat sat", "a good film", "bad dog", "the dog ran a", "good", "bad bad film", "the", "a cat"])
    LABELS = np.array([0, 1, 0, 1, 1, 0, 1, 0])

    def make(self):
        hub = pytest.importorskip("keras_hub").models
        words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *sorted(set(" ".join(self.TEXTS).split()))]
        preprocessor = hub.BertTextClassifierPreprocessor(hub.BertTokenizer(words), sequence_length=6)
        keras.utils.set_random_seed(3)
        backbone = hub.BertBackbone(len(words), 1, 2, 8, 16, dropout=0.0, max_sequence_length=6)
        return hub.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0)

    def train(self, model, optimizer, x, batch_size):
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(True), run_eagerly=True)
        model.fit(x, self.LABELS, batch_size=batch_size, epochs=UPDATES, shuffle=False, verbose=0)
        return model

    def test_weights(self):
        wanted = self.train(self.make(), sgd(), self.TEXTS, BATCH).get_weights()
        optimizer = GradientAccumulateOptimizer(sgd(), STEPS)
        agree(wanted, self.train(self.make(), optimizer, self.TEXTS, MICRO))
        task = self.make()
        preprocessed, task.preprocessor = task.preprocessor(self.TEXTS), None
        self.train(GradientAccumulateModel(task, micro_batch_size=3), sgd(), preprocessed, BATCH)
        agree(wanted, task)

    def test_a_wrapped_task_names_both_remedies(self):
        expected = r"BertTextClassifier has a `fit`.*GradientAccumulateOptimizer.*`preprocessor` to None"
        with pytest.raises(ValueError, match=expected):
            GradientAccumulateModel(self.make(), micro_batch_size=MICRO)
