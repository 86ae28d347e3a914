"""The check of the loss: what micro-batches can compute passes, and the rest is refused before training starts."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross
from keras import ops

from accumops import GradientAccumulateModel
from accumops.adapters.keras_losses import LossCall
from accumops.training.loss_check import examine_call

SAMPLES, CLASSES, TIME = 8, 5, 6


class Function(keras.losses.Loss):
    """What Keras makes of a function."""

    def __init__(self, function, **arguments):
        super().__init__(name=function.__name__, **arguments)
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


def kind_of(loss, y_true, y_pred, sample_weight=None, *, mask=None, split=None, **arguments):
    y_pred = tf.convert_to_tensor(y_pred)
    if mask is not None:
        y_pred._keras_mask = tf.convert_to_tensor(mask)
    y_true, sample_weight = (None if each is None else tf.convert_to_tensor(each) for each in (y_true, sample_weight))
    call = LossCall("output", loss, y_true, y_pred, sample_weight)
    return examine_call(call, len(y_pred) // 2 if split is None else split, **arguments).kind


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def one_hot(samples=SAMPLES):
    return np.eye(CLASSES, dtype="float32")[labels(samples)]


def labels(*shape):
    return np.random.default_rng(1).integers(0, CLASSES, shape or (SAMPLES,))


def probabilities(*shape):
    exponentials = np.exp(numbers(*shape))
    return exponentials / exponentials.sum(-1, keepdims=True)


def keras_losses():
    """All of Keras's losses but those of a whole batch, with targets and predictions for them."""
    coupled = {"Loss", "Dice", "Tversky", "Circle"}
    for name in sorted(dir(keras.losses)):
        made = getattr(keras.losses, name)
        if name in coupled or not (isinstance(made, type) and issubclass(made, keras.losses.Loss)):
            continue
        if name == "CTC":
            continue  # below, once
        elif name in ("SparseCategoricalCrossentropy", "CategoricalGeneralizedCrossEntropy"):
            yield name, made, labels(), probabilities(SAMPLES, CLASSES)
        else:
            yield name, made, one_hot(), probabilities(SAMPLES, CLASSES)


KERAS_LOSSES = {name: each for name, *each in keras_losses()}


@pytest.mark.parametrize("name", KERAS_LOSSES)
@pytest.mark.some_by_default(9)
def test_means_and_sums_of_keras_pass(name):
    made, y_true, y_pred = KERAS_LOSSES[name]
    ragged = slice(0, 7)
    assert kind_of(made(), y_true[ragged], y_pred[ragged]) == "splits"
    weights = np.linspace(0, 3, SAMPLES, dtype="float32")
    for reduction in ("sum", "mean_with_sample_weight"):
        assert kind_of(made(reduction=reduction), y_true, y_pred, weights) == "splits"
    assert kind_of(made(), y_true, np.full_like(y_pred, 0.25)) == "splits"
    assert kind_of(made(), y_true, y_pred, np.zeros(SAMPLES, "float32")) == "unknown"
    assert kind_of(made(), y_true, np.full_like(y_pred, np.nan)) == "unknown"


def test_ctc_passes():
    assert kind_of(keras.losses.CTC(), np.tile([[1, 2]], (4, 1)), numbers(4, 3, CLASSES)) == "splits"


def test_huge_and_small_numbers_pass():
    for scale in (1e-30, 1e-6, 1e6, 1e15):
        targets, predictions = numbers(SAMPLES, 3) * scale, numbers(SAMPLES, 3, seed=1) * scale
        for loss in (keras.losses.MeanSquaredError(), keras.losses.Huber(), keras.losses.LogCosh()):
            assert kind_of(loss, targets, predictions) in ("splits", "unknown")
    assert kind_of(keras.losses.MeanSquaredError(), targets, np.full((SAMPLES, 3), np.inf, "float32")) == "unknown"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_pass(dtype):
    y_true, y_pred = (tf.cast(numbers(64, 40, seed=seed), dtype) for seed in (0, 1))
    for reduction in ("sum_over_batch_size", "sum"):
        for loss_dtype in ("float32", dtype):
            loss = keras.losses.MeanSquaredError(reduction=reduction, dtype=loss_dtype)
            critic = Function(_critic, reduction=reduction, dtype=loss_dtype)
            kinds = {kind_of(each, y_true, y_pred) for each in (loss, critic)}
            # In bfloat16 the halves of a batch cannot be told apart.
            assert kinds <= ({"splits", "unknown"} if loss_dtype == "bfloat16" else {"splits"})


def _critic(y_true, y_pred):
    """Terms of both signs, which nearly cancel."""
    return ops.sign(y_true) * y_pred


@pytest.mark.parametrize("mode", [{"accum_steps": 2}, {"micro_batch_size": 4}], ids=lambda mode: next(iter(mode)))
def test_probabilities_near_zero_pass(mode):
    """Keras's losses compute with the logits that a softmax was given, and with probabilities where they have none."""
    large = keras.initializers.RandomNormal(stddev=300.0, seed=0)
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "softmax", kernel_initializer=large)])
    model = GradientAccumulateModel(net, **mode)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(np.random.default_rng(0).normal(size=(16, 6)), np.arange(16) % 5, batch_size=8, epochs=1, verbose=0)
    assert int(model.optimizer.iterations) == 16 // 8 // mode.get("accum_steps", 1)


def test_terms_that_cancel_pass():
    signs = np.tile([1.0, -1.0], 500).astype("float32")[:, None]
    assert kind_of(Function(_critic), signs, np.full((1000, 1), 0.1, "float32")) == "splits"
    assert kind_of(Function(_critic), signs, 100 + numbers(1000, 1)) == "splits"


MASK = np.arange(TIME) < np.array([1, 1, 2, 1, 6, 5, 6, 4])[:, None]


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("weights", [None, "sample", "step"])
@pytest.mark.parametrize("arguments", [{}, {"ignore_class": 0}, {"reduction": "mean_with_sample_weight"}], ids=str)
def test_positions_that_count_pass(mask, weights, arguments):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)
    shape = {None: None, "sample": (SAMPLES, 1), "step": (SAMPLES, TIME)}[weights]
    y_true = np.where(numbers(SAMPLES, TIME) > np.linspace(-2, 1, SAMPLES)[:, None], labels(SAMPLES, TIME), 0)
    sample_weight = None if shape is None else np.random.default_rng(2).uniform(0, 2, shape).astype("float32")
    assert kind_of(loss, y_true, numbers(SAMPLES, TIME, CLASSES), sample_weight, mask=mask) == "splits"


def test_a_half_without_valid_positions_passes():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    y_true = np.where(np.arange(SAMPLES)[:, None] < 4, 0, 1 + labels(SAMPLES, TIME) % 4)
    assert kind_of(loss, y_true, numbers(SAMPLES, TIME, CLASSES)) == "splits"
    of_nothing = Function(lambda y, p: ops.sum(ops.where(y > 0, p, 0)) / ops.sum(ops.cast(y > 0, "float32")))
    assert kind_of(of_nothing, y_true, numbers(SAMPLES, TIME)) == "unknown"


def normalized(x):
    return x / ops.norm(x, axis=-1, keepdims=True)


def info_nce(_, pairs):
    scores = ops.matmul(normalized(pairs[:, 0]), ops.transpose(normalized(pairs[:, 1]))) / 0.1
    return keras.losses.sparse_categorical_crossentropy(ops.arange(ops.shape(scores)[0]), scores, from_logits=True)


def clip(_, pairs):
    return (info_nce(None, pairs) + info_nce(None, ops.flip(pairs, 1))) / 2


def siglip(_, pairs):
    scores = ops.matmul(pairs[:, 0], ops.transpose(pairs[:, 1]))
    signs = 2 * ops.eye(ops.shape(scores)[0]) - 1
    return ops.sum(ops.softplus(-signs * scores), axis=-1)


def nt_xent(_, pairs):
    both = normalized(ops.concatenate([pairs[:, 0], pairs[:, 1]]))
    size = ops.shape(pairs)[0]
    scores = ops.matmul(both, ops.transpose(both)) / 0.5 - 1e9 * ops.eye(2 * size)
    other = ops.concatenate([ops.arange(size, 2 * size), ops.arange(size)])
    return ops.mean(keras.losses.sparse_categorical_crossentropy(other, scores, from_logits=True))


def barlow_twins(_, pairs):
    a, b = ((each - ops.mean(each, 0)) / (ops.std(each, 0) + 1e-5) for each in (pairs[:, 0], pairs[:, 1]))
    correlation = ops.matmul(ops.transpose(a), b) / ops.cast(ops.shape(a)[0], "float32")
    return ops.sum(ops.square(correlation - ops.eye(ops.shape(correlation)[0])))


def vicreg(_, pairs):
    a, b = pairs[:, 0], pairs[:, 1]
    spread = sum(ops.mean(ops.relu(1 - ops.sqrt(ops.var(each, 0) + 1e-4))) for each in (a, b))
    return ops.mean(ops.square(a - b)) + spread


def triplet_of_hard_ones(y_true, y_pred):
    distances = ops.sum(ops.square(y_pred[:, None] - y_pred[None]), -1)
    same = ops.equal(ops.reshape(y_true, (-1, 1)), ops.reshape(y_true, (1, -1)))
    farthest = ops.max(ops.where(same, distances, 0), 1)
    nearest = ops.min(ops.where(same, 1e9, distances), 1)
    return ops.relu(farthest - nearest + 1)


def correlation(y_true, y_pred):
    a, b = (each - ops.mean(each) for each in (y_true, y_pred))
    return 1 - ops.sum(a * b) / (ops.sqrt(ops.sum(a * a) * ops.sum(b * b)) + 1e-7)


def root_mean_squared_error(y_true, y_pred):
    return ops.sqrt(ops.mean(ops.square(y_true - y_pred)))


def r_squared(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred)) / ops.sum(ops.square(y_true - ops.mean(y_true)))


def ranking(y_true, y_pred):
    higher = ops.cast(ops.reshape(y_true, (-1, 1)) > ops.reshape(y_true, (1, -1)), "float32")
    return ops.mean(higher * ops.softplus(ops.reshape(y_pred, (1, -1)) - ops.reshape(y_pred, (-1, 1))))


def batch_softmax(y_true, y_pred):
    return -ops.sum(y_true * ops.log_softmax(y_pred, axis=0))


PAIRS, COLUMN = (numbers(SAMPLES), (SAMPLES, 2, 4)), (numbers(SAMPLES, 1, seed=5), (SAMPLES, 1))
SEVERAL = (labels(SAMPLES) % 2, (SAMPLES, 4))
COUPLED = {
    info_nce: PAIRS,
    clip: PAIRS,
    siglip: PAIRS,
    nt_xent: PAIRS,
    barlow_twins: PAIRS,
    vicreg: PAIRS,
    triplet_of_hard_ones: SEVERAL,
    correlation: COLUMN,
    root_mean_squared_error: COLUMN,
    r_squared: COLUMN,
    ranking: COLUMN,
    batch_softmax: COLUMN,
    keras.losses.Dice: (one_hot(), (SAMPLES, CLASSES)),
    keras.losses.Tversky: (one_hot(), (SAMPLES, CLASSES)),
    keras.losses.Circle: (labels() % 2, (SAMPLES, 4)),
}


@pytest.mark.parametrize("loss", COUPLED, ids=lambda loss: loss.__name__)
@pytest.mark.some_by_default(8)
def test_losses_that_couple_samples_are_found(loss):
    y_true, shape = COUPLED[loss]
    made = loss() if isinstance(loss, type) else Function(loss)
    good = numbers(*shape) if shape[-1] in (1, 4) else probabilities(*shape)
    # Predictions of models that begin with zeros, with one output for all, and of ones that have collapsed nearly.
    for y_pred in (good, np.zeros(shape, "float32"), np.full(shape, 0.5, "float32"), 0.5 + 1e-4 * numbers(*shape)):
        assert kind_of(made, y_true, y_pred) == "coupled", y_pred


def test_sums_are_found():
    y_true, y_pred = numbers(SAMPLES, 3), numbers(SAMPLES, 3, seed=1)

    def squares(y_true, y_pred):
        return ops.sum(ops.square(y_true - y_pred))

    assert kind_of(Function(squares), y_true, y_pred) == "sum"
    assert kind_of(Function(lambda y, p: squares(y, p) / 32), y_true, y_pred) == "sum"
    assert kind_of(Function(squares), y_true * 0, y_pred * 0) == "sum"
    assert kind_of(Function(squares, reduction="sum"), y_true, y_pred) == "splits"
    assert kind_of(Function(lambda y, p: squares(y, p) ** 2), y_true, y_pred) == "coupled"


def test_means_whose_reduction_is_a_sum_are_found():
    loss = Function(lambda y, p: ops.mean(ops.square(y - p)), reduction="sum")
    assert kind_of(loss, numbers(SAMPLES, 3), numbers(SAMPLES, 3, seed=1)) == "mean"


def mean_of_valid(y_true, logits):
    valid = ops.cast(y_true != 0, "float32")
    losses = keras.losses.sparse_categorical_crossentropy(y_true, logits, from_logits=True)
    return ops.sum(losses * valid) / ops.sum(valid)


def count_of_valid(x, y, sample_weight):
    return tf.math.count_nonzero(y, dtype=tf.float32)


@pytest.mark.parametrize("logits", [1.0, 1e-3, 0.0], ids=lambda scale: f"logits of {scale}")
def test_denominators_of_a_loss_are_found(logits):
    """Also where the counts of both halves are much the same, and so are the losses."""
    y_true = labels(64, 30) * (np.arange(30) < np.random.default_rng(3).integers(15, 30, 64)[:, None])
    y_pred = numbers(64, 30, CLASSES) * logits
    assert kind_of(Function(mean_of_valid), y_true, y_pred) == "denominator"
    given = {"x": None, "y": tf.constant(y_true), "sample_weight": None}
    arguments = {"normalization": count_of_valid, "given": given}
    assert kind_of(Function(mean_of_valid), y_true, y_pred, **arguments) == "splits"


def test_a_chosen_normalization_may_leave_out_what_the_loss_divides_by():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    y_true, y_pred = labels(SAMPLES, TIME), numbers(SAMPLES, TIME, CLASSES)
    given = {"x": None, "y": tf.constant(y_true), "sample_weight": None}
    for normalization in ("samples", "steps", count_of_valid):
        assert kind_of(loss, y_true, y_pred, mask=MASK, normalization=normalization, given=given) == "splits"


def test_random_losses_are_no_verdict():
    seeds = keras.random.SeedGenerator(1)
    loss = Function(lambda y, p: ops.square(y - p) + keras.random.normal(ops.shape(p), seed=seeds))
    assert kind_of(loss, numbers(SAMPLES, 3), numbers(SAMPLES, 3, seed=1)) == "unknown"


def test_groups_of_neighbours_pass():
    def of_groups(size):
        def margins(_, y_pred):
            groups = ops.reshape(y_pred, (-1, size))
            return ops.relu(1 - groups[:, 0] + ops.max(groups[:, 1:], -1))

        return Function(margins)

    for samples, group in ((12, 2), (6, 2), (10, 2), (9, 3), (15, 3), (12, 4), (32, 4)):
        assert kind_of(of_groups(group), numbers(samples), numbers(samples, 1)) == "splits"
    # Where a step splits its batch, there are two micro-batches to compare.
    assert kind_of(of_groups(2), numbers(4), numbers(4, 1), split=2) == "splits"


def test_what_is_no_batch_is_no_verdict():
    loss = Function(lambda y, p: ops.mean(ops.square(p)) + 0 * ops.sum(y))
    assert kind_of(loss, numbers(3), numbers(SAMPLES, 2)) == "unknown"
    assert kind_of(loss, numbers(1), numbers(1, 2)) == "unknown"
    assert kind_of(loss, numbers(SAMPLES), numbers(2, 2)) == "unknown"
    assert kind_of(keras.losses.MeanSquaredError(), numbers(SAMPLES), numbers(SAMPLES), np.float32(2)) == "splits"


def test_few_samples_of_many_predictions_are_enough():
    seen = []

    def squares(y_true, y_pred):
        seen.append(len(y_pred))
        return ops.mean(ops.square(y_pred))

    assert kind_of(Function(squares), numbers(64), numbers(64, 1 << 16)) == "splits"
    assert max(seen) == 4


def network(units=4, head="zeros"):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, kernel_initializer=head)])


MODES = {"accum_steps": ({"accum_steps": 2}, 4), "micro_batch_size": ({"micro_batch_size": 4}, SAMPLES)}
RUNS = {
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps in one call": {"steps_per_execution": 2, "jit_compile": False},
}


def summed_squares(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred))


@pytest.mark.parametrize(
    ("mode", "run"),
    cross(MODES, RUNS, default=lambda mode, run: (mode == "accum_steps") == (run in ("graph", "steps in one call"))),
)
def test_a_failed_check_changes_nothing(mode, run):
    wrap, batch_size = MODES[mode]
    model = GradientAccumulateModel(network(), **wrap)
    model.compile(keras.optimizers.Adam(), summed_squares, metrics=["mae"], **RUNS[run])
    for _ in range(2):  # nor does it clear the loss
        with pytest.raises(ValueError, match=r"^The loss 'summed_squares'.* It looks like a sum over samples"):
            model.fit(numbers(16, 3), numbers(16, 4), batch_size=batch_size, verbose=0)
    with pytest.raises(ValueError, match="It looks like a sum"):
        model.train_on_batch(numbers(batch_size, 3), numbers(batch_size, 4))
    assert not any(np.any(each) for each in model.get_weights())
    assert int(model.optimizer.iterations) == 0
    assert all(not np.any(each.numpy()) for each in model.metrics_variables)


def test_a_warning_comes_once_and_training_goes_on():
    with pytest.raises(ValueError, match=r"`check_loss` must be one of \('error', 'warn', False\). Received: True"):
        GradientAccumulateModel(network(), accum_steps=2, check_loss=True)
    model = GradientAccumulateModel(network(), accum_steps=2, check_loss="warn")
    assert GradientAccumulateModel.from_config(model.get_config()).check_loss == "warn"
    model.compile("sgd", summed_squares, run_eagerly=True)
    data = numbers(16, 3), numbers(16, 4)
    with pytest.warns(UserWarning, match="It looks like a sum"):
        model.fit(*data, batch_size=4, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(*data, batch_size=4, verbose=0)
        unchecked = GradientAccumulateModel(network(), accum_steps=2, check_loss=False)
        unchecked.compile("sgd", summed_squares, run_eagerly=True)
        unchecked.fit(*data, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 4
    model.compile("sgd", summed_squares, run_eagerly=True)
    with pytest.warns(UserWarning, match="It looks like a sum"):
        model.fit(*data, batch_size=4, verbose=0)


class Stateful(keras.layers.Layer):
    """Has every kind of state that a call can move, and a loss of its own."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(7)
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.calls = self.add_weight(shape=(), dtype="int32", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1)
        self.add_loss(ops.sum(ops.square(inputs)))
        return self.dropout(inputs) + 0 * keras.random.normal((4,), seed=self.seeds)


@pytest.mark.parametrize("steps_per_execution", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
@pytest.mark.exhaustive
def test_training_is_the_same_with_and_without_the_check(steps_per_execution):
    """No state moves, no batch is lost or seen twice, and nothing is traced again."""

    def train(check_loss):
        traced = []

        def squares(y_true, y_pred):
            if not tf.executing_eagerly():
                traced.append(y_pred.shape)
            return ops.square(y_true - y_pred)

        keras.utils.set_random_seed(3)
        layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), Stateful()]
        net = keras.Sequential([keras.Input((3,)), *layers])
        model = GradientAccumulateModel(net, micro_batch_size=2, check_loss=check_loss)
        model.compile("sgd", squares, steps_per_execution=steps_per_execution, jit_compile=False)
        data = tf.data.Dataset.from_tensor_slices((numbers(30, 3), numbers(30, 4))).shuffle(30, seed=5).batch(4)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0)
        variables = [*net.variables, *model.optimizer.variables]
        return [each.numpy() for each in variables], history.history["loss"], traced

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layers whose state moves")
        (plain, losses, traced), (checked, checked_losses, checked_traced) = train(False), train("error")
    assert losses == checked_losses
    assert traced == checked_traced
    for a, b in zip(plain, checked, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_that_show_nothing_leave_it_to_later_ones():
    model = GradientAccumulateModel(network(), accum_steps=2)
    model.compile("sgd", summed_squares, run_eagerly=True)
    one = numbers(1, 3), numbers(1, 4)
    for _ in range(5):
        model.train_on_batch(*one)
    for _ in range(2):  # of which number 1, 2 and 4 were looked at
        model.train_on_batch(numbers(4, 3), numbers(4, 4))
    with pytest.raises(ValueError, match="It looks like a sum"):
        model.train_on_batch(numbers(4, 3), numbers(4, 4))


def test_windows_of_one_micro_batch_need_no_check():
    for wrap in ({"accum_steps": 1}, {"micro_batch_size": SAMPLES}):
        model = GradientAccumulateModel(network(), **wrap)
        model.compile("sgd", summed_squares, run_eagerly=True)
        model.train_on_batch(numbers(SAMPLES, 3), numbers(SAMPLES, 4))
    model = GradientAccumulateModel(network(), accum_steps=1)
    model.compile("sgd", summed_squares, run_eagerly=True)
    model.accum_steps = 2
    with pytest.raises(ValueError, match="It looks like a sum"):
        model.train_on_batch(numbers(SAMPLES, 3), numbers(SAMPLES, 4))


def test_outputs_are_named_and_each_is_checked():
    inputs = keras.Input((3,))
    outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("first", "second", "third")}
    net = keras.Model(inputs, outputs)
    model = GradientAccumulateModel(net, micro_batch_size=4)
    model.compile("sgd", {"first": "mse", "second": correlation}, run_eagerly=True)
    targets = {name: numbers(SAMPLES, 1, seed=seed) for seed, name in enumerate(outputs)}
    with pytest.raises(ValueError, match=r"'correlation' of the output 'second' .*couples the samples") as raised:
        model.train_on_batch(numbers(SAMPLES, 3), targets)
    assert "'first'" not in str(raised.value)


def test_a_compute_loss_of_a_models_own_is_checked():
    class Own(GradientAccumulateModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + self.extra(x, y_pred)

    def model(extra):
        made = Own(network(head="glorot_uniform"), micro_batch_size=4)
        made.extra = extra
        made.compile("sgd", "mse", run_eagerly=True)
        return made

    data = numbers(SAMPLES, 3), numbers(SAMPLES, 4)
    model(lambda x, y_pred: ops.mean(y_pred[:, 0] * x[:, 0]) + 7.0).train_on_batch(*data)
    with pytest.raises(ValueError, match="`compute_loss` of Own cannot be accumulated"):
        model(lambda x, y_pred: ops.std(y_pred)).train_on_batch(*data)


def test_regularizers_and_a_model_that_is_not_built_pass():
    net = keras.Sequential([keras.layers.Dense(4, kernel_regularizer="l2"), keras.layers.Dropout(0.5)])
    model = GradientAccumulateModel(net, accum_steps=2)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(numbers(8, 3), numbers(8, 4), class_weight=None, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 1


def test_a_loss_of_one_batch_size_is_not_checked_with_a_warning():
    def squares(y_true, y_pred):
        return ops.square(ops.reshape(y_true, (4, 4)) - ops.reshape(y_pred, (4, 4)))

    model = GradientAccumulateModel(network(), accum_steps=2)
    model.compile("sgd", squares, run_eagerly=True)
    with pytest.warns(UserWarning, match="The loss was not checked: .*check_loss=False"):
        model.fit(numbers(16, 3), numbers(16, 4), batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_an_error_of_the_step_is_the_steps():
    model = GradientAccumulateModel(network(), accum_steps=2)
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="Dimensions must be equal"):
        model.fit(numbers(8, 3), numbers(8, 5), batch_size=4, verbose=0)


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_models_of_other_precisions_pass(name):
    keras.utils.set_random_seed(1)
    policy = functools.partial(keras.layers.Dense, dtype=name)
    net = keras.Sequential([keras.Input((3,)), policy(8, activation="tanh"), policy(4)])
    model = GradientAccumulateModel(net, micro_batch_size=16)
    model.compile("sgd", "mse", run_eagerly=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The loss")
        model.train_on_batch(numbers(64, 3), numbers(64, 4))
