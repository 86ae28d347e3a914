"""What goes with windows that run layer by layer: losses, weights, masks, random layers, precisions, optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from whole_batches import RUNS, SquaresLoss, check_same, train, windows_of

import accumops

L = keras.layers
BN = L.BatchNormalization
SAMPLES = 19  # batches of 12 and 7, in micro-batches of 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(SAMPLES, 5)), RNG.normal(size=(SAMPLES, 2))
WORDS = RNG.integers(0, 9, (SAMPLES, 6))
WORDS[:, 0] = np.maximum(WORDS[:, 0], 1)


def network(*more, **first):
    keras.utils.set_random_seed(1)
    parts = [L.Dense(6, **first), BN(), L.Activation("tanh"), *more, L.Dense(4), BN(), L.Activation("tanh")]
    return keras.Sequential([keras.Input((5,)), *parts, L.Dense(2)])


def compare(net, data, *, micro=5, every=1, run="eager", model=None, atol=1e-11, **settings):
    trained = train(net, data, micro=micro, every=every, run=run, model=model, **settings)
    check_same(trained, train(net, data, **settings), atol=atol)
    return trained


LOSSES_OF_LAYERS = {
    "before": lambda: [SquaresLoss(), L.Dense(5), BN(), L.Dense(2)],
    "between": lambda: [L.Dense(5), BN(), SquaresLoss(), L.Dense(4), BN(), L.Dense(2)],
    "last": lambda: [L.Dense(5), BN(), L.Dense(2), SquaresLoss()],
    "all": lambda: [SquaresLoss(), L.Dense(5), SquaresLoss(), BN(), SquaresLoss(), BN(), SquaresLoss(), L.Dense(2)],
}


@pytest.mark.parametrize(
    ("where", "loss_over", "run", "every"),
    cross(
        LOSSES_OF_LAYERS,
        ["micro_batch", "window"],
        RUNS,
        [1, 100],
        default=lambda where, over, run, every: (
            (run, every) == ("eager", 1) if over == "micro_batch" else (where, run, every) == ("all", "graph", 100)
        ),
    ),
)
@pytest.mark.some_by_default(1)
def test_losses_that_layers_add(float64, where, loss_over, run, every):
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((5,)), *LOSSES_OF_LAYERS[where]()])
    compare(net, {"x": X, "y": Y}, run=run, every=every, model={"loss_over": loss_over})


WEIGHTS = RNG.uniform(0, 2, SAMPLES)
BLOCKED = np.where((np.arange(SAMPLES) >= 5) & (np.arange(SAMPLES) < 10), 0.0, WEIGHTS)  # one micro-batch has none
LABELS = RNG.integers(0, 2, SAMPLES)


def weighted_mean():
    return {"loss": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")}


@pytest.mark.parametrize(
    ("weights", "loss", "model"),
    [
        (WEIGHTS, dict, {}),
        (WEIGHTS, weighted_mean, {"normalization": "weights"}),
        (BLOCKED, weighted_mean, {"normalization": "weights"}),
        (WEIGHTS, weighted_mean, {"loss_over": "window"}),
    ],
    ids=["sample mean", "weighted mean", "a micro-batch without weight", "one loss"],
)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_sample_weights(float64, weights, loss, model):
    compare(network(), {"x": X, "y": Y, "sample_weight": weights}, model=model, weighted_metrics=["mse"], **loss())


@pytest.mark.exhaustive
def test_class_weights(float64):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = {"x": X, "y": LABELS, "class_weight": {0: 0.5, 1: 2.0}}
    compare(network(), data, loss=loss, metrics=["accuracy"])


@pytest.mark.parametrize("run", ["eager", pytest.param("xla", marks=pytest.mark.exhaustive)])
@pytest.mark.exhaustive
def test_a_sum(float64, run):
    sums = keras.losses.MeanSquaredError(reduction="sum")
    compare(network(), {"x": X, "y": Y}, loss=sums, run=run, optimizer=lambda: keras.optimizers.SGD(0.005))


def masking(units):
    keras.utils.set_random_seed(1)
    words = keras.Input((6,), dtype="int32")
    hidden = accumops.AccumBatchNormalization()(L.Embedding(9, 4, mask_zero=True)(words))
    hidden = accumops.AccumBatchNormalization()(L.Dense(4, activation="tanh")(hidden))
    return keras.Model(words, L.Dense(2)(hidden if units is None else L.LSTM(units, unroll=True)(hidden)))


@pytest.mark.parametrize(
    ("units", "model"),
    [
        pytest.param(3, {}, marks=pytest.mark.exhaustive),
        (None, {"normalization": "weights"}),
        (None, {"loss_over": "window"}),
    ],
)
@pytest.mark.some_by_default(1)
def test_masks(float64, units, model):
    """The moments are those of valid positions.

    Keras adds 1e-7 to the number of valid positions, in the layer and in the loss. So the whole batch as one
    micro-batch is what to compare with, and Keras is near it.
    """
    net = masking(units)
    data = {"x": WORDS, "y": RNG.normal(size=(SAMPLES, 2) if units else (SAMPLES, 6, 2))}
    settings = {"every": 1, "run": "graph" if units else "eager"}
    net = accumops.restore_batchnorm_layers(net)
    trained = train(net, data, micro=5, model=model, **settings)
    check_same(trained, train(net, data, micro=12, model={"loss_over": "window"}, **settings), atol=1e-7)
    check_same(trained, train(net, data), atol=1e-6)


def test_moments_leave_masked_positions_out():
    keras.utils.set_random_seed(1)
    words = keras.Input((6,), dtype="int32")
    table = L.Embedding(9, 4, mask_zero=True)
    norm = accumops.AccumBatchNormalization(statistics="window", momentum=0.0)
    model = accumops.GradientAccumulateModel(
        keras.Model(words, L.GlobalAveragePooling1D()(norm(table(words)))), micro_batch_size=5
    )
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    model.train_on_batch(WORDS, np.zeros((SAMPLES, 4)))
    values = table.embeddings.numpy().astype("float64")[WORDS[WORDS > 0]]
    np.testing.assert_allclose(norm.moving_mean, values.mean(0), atol=1e-7)
    np.testing.assert_allclose(norm.moving_variance, values.var(0), atol=1e-7)


RANDOM = {
    "dropout": lambda: [L.Dropout(0.5, seed=2), L.Dense(5), L.Dropout(0.3, seed=2)],
    "noise": lambda: [L.GaussianNoise(0.1, seed=2), L.SpatialDropout1D(0.3, seed=3)],
}


def random_network(kind):
    keras.utils.set_random_seed(1)
    x = keras.Input((4, 5))
    hidden = L.Dropout(0.2, seed=1)(x)
    for layer in [L.Dense(5), BN(), *RANDOM[kind](), L.Dense(4), BN(), L.Dropout(0.5, seed=4)]:
        hidden = layer(hidden)
    return keras.Model(x, L.Dense(2)(L.Flatten()(hidden)))


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_random_layers_in_one_micro_batch(float64, kind):
    """The whole batch is the micro-batch: plain Keras draws the same masks, and their seeds go on the same way."""
    net = random_network(kind)
    data = {"x": RNG.normal(size=(24, 4, 5)), "y": RNG.normal(size=(24, 2))}
    trained, wanted = train(net, data, micro=12, every=1), train(net, data)
    check_same(trained, wanted)
    for mine, its in zip(trained.net.get_weights(), wanted.net.get_weights(), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-10)


def loss_and_gradient(net, x, y, along, step, **settings):
    """The loss at the weights moved along a direction, and its derivative along it."""
    net = windows_of(net, every=settings.pop("every"))
    for variable, direction in zip(net.trainable_variables, along, strict=True):
        variable.assign_add(step * direction)
    before = [each.numpy() for each in net.trainable_variables]
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5, **settings)
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    loss = model.train_on_batch(x, y)
    moved = zip(before, net.trainable_variables, along, strict=True)
    return loss, sum(np.sum((old - variable.numpy()) * direction) for old, variable, direction in moved)


@pytest.mark.parametrize(
    ("kind", "every", "loss_over"),
    cross(
        RANDOM,
        [1, 100],
        ["micro_batch", "window"],
        default=lambda *each: each in (("dropout", 1, "micro_batch"), ("noise", 100, "window")),
    ),
)
@pytest.mark.some_by_default(1)
def test_gradients_with_random_layers_are_those_of_the_loss(float64, kind, every, loss_over):
    """By a finite difference: so both runs of a stretch draw the same masks."""
    net, rng = random_network(kind), np.random.default_rng(3)
    x, y = rng.normal(size=(12, 4, 5)), rng.normal(size=(12, 2))
    along, settings = [rng.normal(size=each.shape) for each in net.trainable_variables], {"loss_over": loss_over}
    _, derivative = loss_and_gradient(net, x, y, along, 0.0, every=every, **settings)
    more, less = (loss_and_gradient(net, x, y, along, h, every=every, **settings)[0] for h in (1e-5, -1e-5))
    assert derivative == pytest.approx((more - less) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("run", ["graph", pytest.param("xla", marks=pytest.mark.exhaustive)])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_half_precision(policy, run):
    """As near to float32 as Keras is, with samples in another order."""
    x, y = RNG.normal(size=(12, 8, 8, 3)).astype("float32"), RNG.integers(0, 3, 12)
    order = RNG.permutation(12)

    def network():
        keras.utils.set_random_seed(1)
        parts = [L.Conv2D(8, 3), BN(), L.ReLU(), L.Conv2D(8, 3), BN(), L.ReLU(), L.GlobalAveragePooling2D()]
        return keras.Sequential([keras.Input((8, 8, 3)), *parts, L.Dense(3, dtype="float32")])

    def gradient(net, **settings):
        start = net.trainable_variables[0].numpy(), net.trainable_variables[4].numpy()
        data = settings.pop("data", {"x": x, "y": y})
        trained = train(net, data, optimizer=optimizer, loss=loss, **settings)
        ends = trained.net.trainable_variables[0].numpy(), trained.net.trainable_variables[4].numpy()
        return np.concatenate([(a - b).ravel() for a, b in zip(ends, start, strict=True)]), trained

    def optimizer():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0**10)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    truth, _ = gradient(network())
    keras.config.set_dtype_policy(policy)
    try:
        net = network()
        keras_own, wanted = gradient(net)
        shuffled, _ = gradient(net, data={"x": x[order], "y": y[order]})
        mine, trained = gradient(net, micro=5, every=1, run=run)
    finally:
        keras.config.set_dtype_policy("float32")
    assert trained.net.layers[1].compute_dtype == policy.removeprefix("mixed_")
    budget = max(np.abs(each - truth).max() for each in (keras_own, shuffled))
    assert np.abs(mine - truth).max() <= 1.5 * budget
    assert trained.history["loss"] == pytest.approx(wanted.history["loss"], rel=1e-2)
    statistics = [each.numpy() for each in trained.net.layers[1].non_trainable_variables]
    for mine, its in zip(statistics, wanted.net.layers[1].non_trainable_variables, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-2, atol=1e-4)


def test_a_window_that_overflows_makes_no_update():
    """With loss scaling in float16: the scale backs off, and weights and moving statistics stay."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        keras.utils.set_random_seed(1)
        net = keras.Sequential([keras.Input((5,)), L.Dense(4), BN(), L.Dense(2, dtype="float32")])
    finally:
        keras.config.set_dtype_policy("float32")
    net = windows_of(net)
    before = net.get_weights()
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**100)
    model.compile(scaled, "mse", jit_compile=False)
    model.train_on_batch(X[:12], Y[:12])
    for index, (mine, its) in enumerate(zip(net.trainable_variables, before[:2] + before[2:4], strict=False)):
        np.testing.assert_array_equal(mine, its, err_msg=str(index))
    assert float(scaled.dynamic_scale) == 2.0**99


def with_a_broken_sample(at):
    x = X.copy()
    x[at] = np.nan
    return x


@pytest.mark.parametrize("run", ["eager", "graph", pytest.param("xla", marks=pytest.mark.exhaustive)])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_a_window_with_a_broken_sample_is_dropped(float64, run):
    """Its logs, weights and statistics are those of the other window alone."""
    net = network()
    data = {"x": with_a_broken_sample(4), "y": Y}
    trained = train(net, data, micro=5, every=1, run=run, model={"nonfinite": "drop"}, metrics=["mae"])
    wanted = train(net, {"x": X[12:], "y": Y[12:]}, metrics=["mae"])
    check_same(trained, wanted)
    assert trained.history["nonfinite_count"] == [1]
    assert int(trained.model.optimizer.nonfinite_count) == 1


OPTIMIZERS = {
    "clipped": (lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.05), True),
    "RMSprop": (lambda: keras.optimizers.RMSprop(0.001, use_ema=True, ema_overwrite_frequency=1), False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_optimizers(name):
    """In float32, of which the fused update is. Adam divides by gradients, so that rounding counts."""
    make, fused = OPTIMIZERS[name]
    data = {"x": X.astype("float32"), "y": Y.astype("float32")}
    run = "graph" if fused else "eager"
    trained = compare(network(), data, run=run, optimizer=make, atol=2e-5, epochs=2)
    assert bool(trained.model.optimizer.fused_update) == fused


@pytest.mark.exhaustive
def test_gradient_clipping_of_the_window(float64):
    """Adaptive clipping sees the gradient of the window, not of a part of the model or of a micro-batch."""
    net, data = network(), {"x": X, "y": Y}
    arguments = {"optimizer": lambda: keras.optimizers.SGD(0.1), "every": 1}
    model = {"gradient_clipping": accumops.AdaptiveGradientClipping(0.01)}
    whole = train(net, data, micro=12, model=model, **arguments)
    check_same(train(net, data, micro=5, model=model, **arguments), whole)
    unclipped = train(net, data, micro=5, **arguments)
    assert np.abs(unclipped.net.get_weights()[0] - whole.net.get_weights()[0]).max() > 1e-3


@pytest.mark.parametrize("run", [pytest.param("eager", marks=pytest.mark.exhaustive), "graph"])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_lazy_embeddings(float64, run):
    """Rows that a window does not touch stay, and keep their momentum."""
    keras.utils.set_random_seed(1)
    words = keras.Input((6,), dtype="int32")
    hidden = BN()(L.Embedding(40, 4)(words))
    net = keras.Model(words, L.Dense(2)(L.Flatten()(hidden + L.Embedding(40, 4)(words))))
    settings = {"optimizer": lambda: keras.optimizers.Adam(0.01), "every": 1, "epochs": 2}
    data, model = {"x": np.arange(114).reshape(SAMPLES, 6) % 37, "y": Y}, {"lazy_sparse": True}
    trained = train(net, data, micro=5, run=run, model=model, **settings)
    check_same(trained, train(net, data, micro=12, model=model, **settings))
    for table in (each for each in trained.net.weights if "embeddings" in each.path):
        start = next(each for each in net.weights if each.path == table.path)
        np.testing.assert_array_equal(table.numpy()[37:], start.numpy()[37:])
        assert np.abs(table.numpy()[:37] - start.numpy()[:37]).max() > 1e-3


@pytest.mark.parametrize(
    "run", ["graph", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("eager", "xla"))]
)
def test_a_contrastive_loss_over_the_window(float64, run):
    net = keras.Sequential([keras.Input((2, 5)), L.Dense(6), BN(), L.Activation("tanh"), L.Dense(4), BN()])
    data = {"x": RNG.normal(size=(SAMPLES, 2, 5)), "y": np.zeros(SAMPLES)}
    compare(net, data, run=run, model={"loss_over": "window"}, loss=accumops.losses.CLIPLoss(0.5), atol=1e-9)


def test_a_loss_over_windows_of_other_shapes(float64):
    """Eagerly the shapes of one window are no others' than its own."""
    keras.utils.set_random_seed(1)
    x = keras.Input((None, 5))
    net = keras.Model(x, L.Dense(2)(BN()(L.Dense(4)(x))))
    wanted, mine = accumops.restore_batchnorm_layers(net), windows_of(net)
    model = accumops.GradientAccumulateModel(mine, micro_batch_size=5, loss_over="window")
    for each in (wanted, model):
        each.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    for samples, length in ((12, 4), (12, 6), (10, 4), (3, 6), (12, 4)):
        batch = RNG.normal(size=(samples, length, 5)), RNG.normal(size=(samples, length, 2))
        assert model.train_on_batch(*batch) == pytest.approx(wanted.train_on_batch(*batch), rel=1e-12)
    for one, other in zip(mine.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


@pytest.mark.exhaustive
def test_metrics_of_all_kinds(float64):
    """A function that gives one value for a batch counts when all of the batch has been seen."""

    def largest_share(y, outputs):
        return tf.reduce_mean(tf.nn.softmax(outputs))

    def squares(y, outputs):
        return tf.reduce_mean((y - outputs) ** 2, axis=-1)

    compare(network(), {"x": X, "y": Y}, metrics=[largest_share, squares, "mae"])


def test_inputs_that_each_micro_batch_gets_whole(float64):
    keras.utils.set_random_seed(1)
    x, prototypes = keras.Input((5,), name="x"), keras.Input((5,), name="prototypes")
    near = L.Lambda(lambda pair: tf.matmul(pair[0], pair[1], transpose_b=True), output_shape=(3,))
    hidden = BN()(near([L.Dense(5)(x), prototypes]))
    net = keras.Model({"x": x, "prototypes": prototypes}, L.Dense(2)(hidden))
    data = {"x": X[:12], "prototypes": RNG.normal(size=(3, 5))}
    wanted, mine = accumops.restore_batchnorm_layers(net), windows_of(net)
    model = accumops.GradientAccumulateModel(mine, micro_batch_size=5, whole_inputs=["prototypes"])
    for each in (wanted, model):
        each.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        data = {name: tf.convert_to_tensor(value) for name, value in data.items()}
        each.train_step((data, tf.convert_to_tensor(Y[:12])))
    for one, other in zip(mine.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)
