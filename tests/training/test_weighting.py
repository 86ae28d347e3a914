"""With `normalization="auto"` the update is the large batch's, whatever its loss divides by."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

from accumops import GradientAccumulateModel

SAMPLES, LENGTH, WORDS = 22, 6, 5
MODES = {"accum_steps": ({"accum_steps": 4}, 6), "micro_batch_size": ({"micro_batch_size": 6}, SAMPLES)}
RUNS = {"graph": {}, "eager": {"run_eagerly": True}}
WAYS = [(mode, run) for run in reversed(RUNS) for mode in MODES]


@pytest.fixture
def text(rng):
    """Tokens, padded with 0 and of very different lengths, labels with some ignored, and weights."""
    lengths = rng.integers(1, LENGTH + 1, SAMPLES)
    lengths[:6] = 1  # a micro-batch with few valid positions
    valid = np.arange(LENGTH) < lengths[:, None]
    tokens = np.where(valid, rng.integers(1, WORDS, (SAMPLES, LENGTH)), 0)
    labels = rng.integers(0, WORDS, (SAMPLES, LENGTH))
    ignored = np.where(rng.random((SAMPLES, LENGTH)) < np.linspace(0.1, 0.8, SAMPLES)[:, None], -1, labels)
    weights = rng.random((SAMPLES, LENGTH)).astype("float32") * np.linspace(0.2, 3, SAMPLES)[:, None]
    return {"tokens": tokens, "labels": labels, "ignored": ignored, "weights": weights.astype("float32")}


def network(mask, outputs=1):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((LENGTH,), dtype="int32")
    features = keras.layers.Embedding(WORDS, 4, mask_zero=mask)(inputs)
    heads = [keras.layers.Dense(WORDS, name=f"head_{i}")(features) for i in range(outputs)]
    return keras.Model(inputs, heads if outputs > 1 else heads[0])


def cross_entropy(**arguments):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)


CASES = {
    "samples": (False, {}, "labels", None),
    "layer's mask": (True, {}, "labels", None),
    "ignored labels": (False, {"ignore_class": -1}, "ignored", None),
    "mask and ignored labels": (True, {"ignore_class": -1}, "ignored", None),
    "weights that do not divide": (True, {}, "labels", "weights"),
    "sum of weights": (False, {"reduction": "mean_with_sample_weight"}, "labels", "weights"),
    "sum of a weight for each sample": (False, {"reduction": "mean_with_sample_weight"}, "labels", "one"),
    "sum of weights under a mask": (True, {"reduction": "mean_with_sample_weight"}, "labels", "weights"),
    "sum of weights and ignored labels": (
        True,
        {"reduction": "mean_with_sample_weight", "ignore_class": -1},
        "ignored",
        "weights",
    ),
    "reduction by weights without weights": (True, {"reduction": "mean_with_sample_weight"}, "labels", None),
}


def weights_after(wrap, batch_size, mask, loss, y, sample_weight, tokens, **compiled):
    net = network(mask)
    model = GradientAccumulateModel(net, **wrap) if wrap else net
    # Plain Keras runs eagerly, because tracing it would take longer than its two steps.
    model.compile(keras.optimizers.SGD(1.0), loss, **(compiled if wrap else {"run_eagerly": True}))
    history = model.fit(
        tokens, y, sample_weight=sample_weight, batch_size=batch_size, shuffle=False, epochs=2, verbose=0
    )
    return net.get_weights(), history.history["loss"]


@pytest.mark.parametrize(
    ("case", "mode", "run"),
    cross(CASES, MODES, RUNS, default=lambda case, *way: (case, way) in turns(CASES, WAYS)),
)
@pytest.mark.some_by_default(2)
def test_equals_the_large_batch(text, mode, case, run):
    mask, arguments, y, weighted_by = CASES[case]
    sample_weight = {None: None, "weights": text["weights"], "one": text["weights"][:, :1]}[weighted_by]
    common = (mask, cross_entropy(**arguments), text[y], sample_weight, text["tokens"])
    expected, losses = weights_after(None, SAMPLES, *common)
    wrap, batch_size = MODES[mode]
    found, logged = weights_after(wrap, batch_size, *common, **RUNS[run])
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-7)
    if mode == "micro_batch_size":
        np.testing.assert_allclose(logged, losses, rtol=1e-6)


@pytest.mark.exhaustive
def test_weights_by_name(text):
    """`normalization="weights"` finds the same, for one output."""
    common = (True, cross_entropy(ignore_class=-1), text["ignored"], None, text["tokens"])
    wrap, batch_size = MODES["micro_batch_size"]
    expected, _ = weights_after(wrap, batch_size, *common)
    found, _ = weights_after({**wrap, "normalization": "weights"}, batch_size, *common)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize(
    "run",
    [{"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.exhaustive)],
    ids=["eager", "xla"],
)
def test_ignored_labels_in_other_runs(text, run):
    common = (True, cross_entropy(ignore_class=-1), text["ignored"], None, text["tokens"])
    expected, _ = weights_after(None, SAMPLES, *common)
    for wrap, batch_size in MODES.values():
        found, _ = weights_after(wrap, batch_size, *common, **run)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_counts_in_float64_for_float64(text):
    """Shares are counted as exactly as the gradients that they scale."""

    def train(wrap):
        keras.utils.set_random_seed(1)
        net = keras.Sequential([keras.Input((LENGTH,)), keras.layers.Dense(1)])
        net = keras.models.clone_model(net, clone_function=_in_float64)
        model = GradientAccumulateModel(net, **wrap) if wrap else net
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight", dtype="float64")
        model.compile(keras.optimizers.SGD(0.01), loss, run_eagerly=not wrap)
        x, y = text["weights"].astype("float64"), text["labels"][:, :1].astype("float64")
        weights = np.linspace(0.1, 0.7, SAMPLES)
        model.fit(x, y, sample_weight=weights, batch_size=SAMPLES, shuffle=False, verbose=0, epochs=3)
        return net.get_weights()

    for a, b in zip(train(None), train({"micro_batch_size": 5}), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-13)


def _in_float64(layer):
    return type(layer).from_config({**layer.get_config(), "dtype": "float64"})


def test_weights_of_float64_windows_are_float64():
    import accumops

    variable = tf.Variable([0.0], dtype=tf.float64)
    accumulator = accumops.GradientAccumulator(2)
    accumulator.build([variable])
    for weight in (0.1, 0.2):
        accumulator.accumulate([tf.constant([1.0], tf.float64)], weight=tf.constant(weight, tf.float64))
    assert accumulator.close()[0].numpy().tolist() == [1.0]


@pytest.mark.parametrize("mode", cross(MODES, default=lambda mode: mode == "micro_batch_size"))
@pytest.mark.exhaustive
def test_outputs_under_one_mask_share_it(text, mode):
    def train(wrap, batch_size):
        net = network(True, outputs=2)
        model = GradientAccumulateModel(net, **wrap) if wrap else net
        model.compile(keras.optimizers.SGD(1.0), [cross_entropy(), cross_entropy()], run_eagerly=not wrap)
        model.fit(text["tokens"], [text["labels"]] * 2, batch_size=batch_size, shuffle=False, verbose=0)
        return net.get_weights()

    for a, b in zip(train(None, SAMPLES), train(*MODES[mode]), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("run_eagerly", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_outputs_that_divide_by_different_numbers_are_named(text, run_eagerly):
    model = GradientAccumulateModel(network(True, outputs=2), micro_batch_size=6)
    losses = [cross_entropy(), cross_entropy(ignore_class=-1)]
    model.compile("sgd", losses, run_eagerly=run_eagerly)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"divide by different numbers: 'head_0' by the valid positions .*'head_1'"):
        model.fit(text["tokens"], [text["labels"], text["ignored"]], batch_size=SAMPLES, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # Both remedies that the message names work.
    for normalization in ("samples", lambda x, y, sample_weight: tf.reduce_sum(tf.cast(x != 0, tf.float32))):
        model = GradientAccumulateModel(model.model, micro_batch_size=6, normalization=normalization)
        model.compile("sgd", losses, run_eagerly=run_eagerly)
        model.fit(text["tokens"], [text["labels"], text["ignored"]], batch_size=SAMPLES, verbose=0)


def test_masks_of_outputs_are_told_apart_when_they_are_gone(text):
    """Eagerly, each loss's mask of ignored labels is a tensor that nothing else keeps."""
    model = GradientAccumulateModel(network(True, outputs=2), micro_batch_size=6)
    model.compile("sgd", [cross_entropy(ignore_class=-1), cross_entropy(ignore_class=-1)], run_eagerly=True)
    others = np.where(text["labels"] > 2, -1, text["labels"])
    with pytest.raises(ValueError, match="divide by different numbers"):
        model.fit(text["tokens"], [text["ignored"], others], batch_size=SAMPLES, verbose=0)


def test_several_losses_of_one_output_are_all_asked(text):
    model = GradientAccumulateModel(network(False), micro_batch_size=6)
    model.compile("sgd", [cross_entropy(), cross_entropy(ignore_class=-1)])
    with pytest.raises(ValueError, match=r"by samples; .* by the valid positions of its mask"):
        model.fit(text["tokens"], text["ignored"], batch_size=SAMPLES, verbose=0)


@pytest.mark.exhaustive
def test_a_loss_with_its_own_call_counts_by_samples(rng):
    class Doubled(keras.losses.MeanSquaredError):
        def __call__(self, y_true, y_pred, sample_weight=None):
            return 2 * super().__call__(y_true, y_pred, sample_weight)

    def train(wrap, batch_size):
        keras.utils.set_random_seed(1)
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model = GradientAccumulateModel(net, **wrap) if wrap else net
        model.compile(keras.optimizers.SGD(0.1), Doubled(), run_eagerly=not wrap)
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        return net.get_weights()

    x, y = rng.standard_normal((SAMPLES, 3)), rng.standard_normal((SAMPLES, 1))
    for mode in MODES.values():
        for a, b in zip(train(None, SAMPLES), train(*mode), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
