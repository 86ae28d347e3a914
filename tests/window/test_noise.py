"""How noisy gradients are: against the formulas in NumPy, and against a model whose noise is known."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops

SHAPES = [(4, 3), (3,), ()]


class Averages:
    """Numerator and denominator of the noise scale, averaged over windows apart, by the formulas."""

    def __init__(self, decay):
        self.decay, self.trace, self.square, self.known = decay, 0.0, 0.0, 0.0

    def add(self, gradients, shares):
        """Takes a window in: for each micro-batch a list of arrays, and its share."""
        kept = [(g, b) for g, b in zip(gradients, shares, strict=True) if b]
        flat = np.array([np.concatenate([np.ravel(each) for each in g]) for g, _ in kept], np.float64)
        b = np.array([b for _, b in kept], np.float64)
        mean = b @ flat / b.sum()
        if len(kept) > 1:
            trace = (b @ (flat**2).sum(1) - b.sum() * mean @ mean) / (len(kept) - 1)
            for name, value in (("trace", trace), ("square", mean @ mean - trace / b.sum()), ("known", 1.0)):
                setattr(self, name, self.decay * getattr(self, name) + (1 - self.decay) * value)
        return np.sqrt(mean @ mean)

    @property
    def scale(self):
        return max(self.trace, 0) / self.square if self.square > 0 else np.inf


def gradients_of(rng):
    """Gradients with noise about a mean that can be seen."""
    return [(2 + rng.standard_normal(shape)).astype("float32") for shape in SHAPES]


def variables():
    return [tf.Variable(tf.zeros(shape)) for shape in SHAPES]


@pytest.mark.parametrize(
    ("backend", "mode"),
    cross(["fused", "reference"], ["eager", "graph", "xla"], default=lambda backend, mode: backend == "fused"),
    indirect=True,
)
def test_as_the_formulas_say(backend, mode, rng):
    """Windows of several sizes, with shares of any kind; one without a second micro-batch tells nothing."""
    accumulator = accumops.GradientAccumulator(None)
    accumulator.track_noise(0.5)
    accumulator.build(variables(), jit_compile=mode.name == "xla")
    add = mode(lambda weight, *gradients: accumulator.accumulate(gradients, weight=weight))
    close = mode(lambda: accumulator.close()[0])
    wanted = Averages(0.5)
    for shares in ([1, 1], [16, 16, 16, 5], [7], [0.5, 0, 3], [2, 9, 1]):
        window = [gradients_of(rng) for _ in shares]
        for gradients, share in zip(window, shares, strict=True):
            add(tf.constant(float(share)), *map(tf.constant, gradients))
        close()
        norm = wanted.add(window, shares)
        np.testing.assert_allclose(float(accumulator.state.notes.noise.norm), norm, rtol=1e-6)
        np.testing.assert_allclose(float(accumulator.noise_scale), wanted.scale, rtol=1e-5)


def test_nothing_is_known_before_a_window_of_two():
    accumulator = accumops.GradientAccumulator(1)
    accumulator.track_noise()
    accumulator.build(variables())
    assert np.isnan(float(accumulator.noise_scale))
    accumulator.accumulate([tf.ones(shape) for shape in SHAPES])
    accumulator.close()
    assert np.isnan(float(accumulator.noise_scale))


def test_gradients_without_a_mean_are_all_noise(rng):
    accumulator = accumops.GradientAccumulator(2)
    accumulator.track_noise(0.0)
    accumulator.build(variables())
    gradients = gradients_of(rng)
    for sign in (1, -1):
        accumulator.accumulate([sign * tf.constant(each) for each in gradients])
    accumulator.close()
    assert float(accumulator.noise_scale) == np.inf


@pytest.mark.parametrize("policy", ["skip", "drop"])
def test_micro_batches_that_are_not_finite(rng, policy):
    """A window with one tells of the others, or nothing if it is dropped; the averages stay finite."""
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.0), 3, nonfinite=policy)
    optimizer.accumulator.track_noise(0.5)
    optimizer.build(variables())
    apply = tf.function(lambda *gradients: optimizer.apply(gradients))
    wanted = Averages(0.5)
    for bad in (None, 1, None, 2):
        window = [gradients_of(rng) for _ in range(3)]
        for i, gradients in enumerate(window):
            apply(*(tf.constant(each * (np.nan if i == bad else 1), tf.float32) for each in gradients))
        if bad is None or policy == "skip":
            wanted.add(window, [float(i != bad) for i in range(3)])
        else:
            assert np.isnan(float(optimizer.accumulator.state.notes.noise.norm))
    np.testing.assert_allclose(float(optimizer.accumulator.noise_scale), wanted.scale, rtol=1e-5)


def test_a_scaled_loss_is_unscaled(rng):
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=64.0, dynamic_growth_steps=1)
    optimizer = accumops.GradientAccumulateOptimizer(inner, 2)
    optimizer.accumulator.track_noise(0.5)
    optimizer.build(variables())
    wanted = Averages(0.5)
    for _ in range(3):
        window = [gradients_of(rng) for _ in range(2)]
        scale = float(inner.dynamic_scale)  # grows with each window
        for gradients in window:
            optimizer.apply([tf.constant(scale * each) for each in gradients])
        norm = wanted.add(window, [1, 1])
    np.testing.assert_allclose(float(optimizer.accumulator.state.notes.noise.norm), norm, rtol=1e-6)
    np.testing.assert_allclose(float(optimizer.accumulator.noise_scale), wanted.scale, rtol=1e-5)


def test_variables_with_sparse_gradients_are_left_out(rng):
    dense, table = tf.Variable(tf.zeros([4])), tf.Variable(tf.zeros([50, 2]))
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.0), 2)
    optimizer.accumulator.track_noise(0.0)
    optimizer.build([dense, table])
    window = [(2 + rng.standard_normal(4)).astype("float32") for _ in range(2)]
    for gradient in window:
        optimizer.apply([tf.constant(gradient), tf.IndexedSlices(tf.ones([3, 2]), tf.constant([1, 1, 7]))])
    wanted = Averages(0.0)
    wanted.add([[each] for each in window], [1, 1])
    np.testing.assert_allclose(float(optimizer.accumulator.noise_scale), wanted.scale, rtol=1e-5)


def test_sparse_gradients_alone_show_no_gradient():
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
    optimizer.accumulator.track_noise()
    optimizer.build([tf.Variable(tf.zeros([50, 2]))])
    for _ in range(2):
        optimizer.apply([tf.IndexedSlices(tf.ones([3, 2]), tf.constant([1, 1, 7]))])
    assert float(optimizer.accumulator.noise_scale) == np.inf


def test_the_update_is_the_same_as_without(rng):
    """A window's last gradients do not go straight into the update then; no bit of it is different for that."""
    results = []
    for tracked in (False, True):
        weights = [tf.Variable(tf.ones(shape)) for shape in SHAPES]
        optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
        if tracked:
            optimizer.accumulator.track_noise()
        optimizer.build(weights)
        generator = np.random.default_rng(3)
        for _ in range(6):
            optimizer.apply([tf.constant(each) for each in gradients_of(generator)])
        results.append([each.numpy() for each in weights])
    for without, with_noise in zip(*results, strict=True):
        np.testing.assert_array_equal(without, with_noise)


def test_what_is_wrong():
    accumulator = accumops.GradientAccumulator(2)
    accumulator.build(variables())
    with pytest.raises(ValueError, match="does not track noise: call `track_noise"):
        _ = accumulator.noise_scale
    with pytest.raises(ValueError, match=r"`decay` must be at least 0 and less than 1\. Received: 1"):
        accumulator.track_noise(1.0)
    with pytest.raises(TypeError, match="`decay` must be a number"):
        accumulator.track_noise("0.9")
    with pytest.raises(ValueError, match="has reduction='sum'"):
        accumops.GradientAccumulator(2, reduction="sum").track_noise()


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", [[16] * 2, [16] * 4, [16] * 8, [16] * 7 + [5], [64, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_a_linear_model_whose_noise_is_known(sizes, jit_compile):
    """x ~ N(0, 1), y = x w + noise, and the model's weights are 0: E|g|² and the trace follow from moments of x.

    Within three standard errors over 4,000 windows: twenty estimates are seen here, and one in twenty is farther than
    two from the truth. Single windows are told by `decay=0`.
    """
    dimensions, sigma, windows = 50, 2.0, 4000
    truth = 0.3 * np.random.default_rng(0).standard_normal(dimensions).astype("float32")
    square = float(truth @ truth)
    trace = (dimensions + 1) * square + dimensions * sigma**2
    accumulator = accumops.GradientAccumulator(len(sizes))
    accumulator.track_noise(0.0)
    accumulator.build([tf.Variable(tf.zeros([dimensions]))], jit_compile=jit_compile)
    noise = accumulator.state.notes.noise

    @tf.function(jit_compile=jit_compile)
    def window(seed):
        for i, size in enumerate(sizes):
            x = tf.random.stateless_normal([size, dimensions], [seed, 2 * i])
            errors = tf.linalg.matvec(x, truth) + sigma * tf.random.stateless_normal([size], [seed, 2 * i + 1])
            accumulator.accumulate([-tf.linalg.matvec(x, errors, transpose_a=True) / size], weight=float(size))
        accumulator.close()
        return tuple(tf.unstack(noise._averages.value)[:2])

    found = np.array([[float(each) for each in window(tf.constant(seed))] for seed in range(windows)])
    errors = found.std(axis=0) / np.sqrt(windows)
    assert np.all(np.abs(found.mean(axis=0) - [trace, square]) <= 3 * errors), (found.mean(axis=0), errors)
