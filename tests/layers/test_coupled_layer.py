"""Layers of one's own whose outputs depend on sums over all samples, in windows that run layer by layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import accumops
from accumops.layers import CoupledLayer

L = keras.layers
X = np.random.default_rng(0).normal(size=(26, 5))
Y = np.random.default_rng(1).normal(size=(26, 2))
RUNS = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}


@keras.saving.register_keras_serializable(package="tests")
class Whitened(CoupledLayer):
    """Appends features that are projected, centred and multiplied by their covariance over the batch."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 3), name="kernel")

    def totals(self, inputs):
        projected = keras.ops.matmul(inputs, self.kernel)
        count = keras.ops.shape(inputs)[0]
        return {
            "count": keras.ops.cast(count, "int32"),
            "sum": keras.ops.sum(projected, 0),
            "products": keras.ops.matmul(keras.ops.transpose(projected), projected),
        }

    def combine(self, inputs, totals):
        count = keras.ops.cast(totals["count"], totals["sum"].dtype)
        mean = totals["sum"] / count
        covariance = totals["products"] / count - mean[:, None] * mean[None]
        centred = keras.ops.cast(keras.ops.matmul(inputs, self.kernel), mean.dtype) - mean
        added = keras.ops.cast(keras.ops.tanh(keras.ops.matmul(centred, covariance)), inputs.dtype)
        return keras.ops.concatenate([inputs, added], -1)


class Share(CoupledLayer):
    """The share that each sample has in the batch's sum of the second input, times the first."""

    def totals(self, inputs):
        return keras.ops.sum(keras.ops.exp(inputs[1]), 0)

    def combine(self, inputs, totals):
        return inputs[0] * keras.ops.exp(inputs[1]) / totals


@pytest.fixture(autouse=True)
def in_float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def chain():
    return keras.Sequential(
        [keras.Input((5,)), L.Dense(6, "tanh"), Whitened(name="first"), L.Dense(4), Whitened(name="second"), L.Dense(2)]
    )


def before_all():
    """The layer is the first one: no gradient flows to its inputs, and its kernel has one all the same."""
    return keras.Sequential([keras.Input((5,)), Whitened(), L.Dense(2)])


def branches():
    """Two inputs of a layer, a layer that is called twice, and one of another kind beside it."""
    inputs = keras.Input((5,))
    hidden = L.Dense(6, "tanh")(inputs)
    twice = Share()
    shares = twice([hidden, L.Dense(6)(hidden)])
    normalized = L.BatchNormalization()(L.Dense(6)(hidden))
    added = L.Add()([twice([normalized, shares]), Whitened()(normalized)[:, :6]])
    return keras.Model(inputs, L.Dense(2)(added))


def within_a_model():
    inputs = keras.Input((5,))
    inner = keras.Sequential([keras.Input((6,)), L.Dense(4), Whitened()], name="inner")
    return keras.Model(inputs, L.Dense(2)(inner(L.Dense(6, "tanh")(inputs))))


NETS = {"chain": chain, "first": before_all, "branches": branches, "nested": within_a_model}


def trained(net, micro, run="eager", model=None, **arguments):
    """A copy of a network after three updates, and its logs."""
    keras.utils.set_random_seed(5)
    net = NETS[net]()
    if micro is not None:
        net = accumops.replace_batchnorm_layers(net, statistics="window", every=1)
    whole = net if micro is None else accumops.GradientAccumulateModel(net, micro_batch_size=micro, **(model or {}))
    whole.compile(keras.optimizers.SGD(0.1, momentum=0.9), **({"loss": "mse"} | arguments), **RUNS[run])
    history = whole.fit(X, Y, batch_size=13, epochs=2, shuffle=False, verbose=0).history
    return net, history


def check_same(mine, its, atol):
    for variable, value in zip(mine[0].weights, its[0].get_weights(), strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=atol, atol=atol, err_msg=variable.path)
    for name, values in its[1].items():
        np.testing.assert_allclose(mine[1][name], values, rtol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("net", "micro", "run"),
    [
        ("chain", 4, "eager"),
        ("chain", 5, "xla"),
        ("first", 5, "graph"),
        ("branches", 4, "graph"),
        ("nested", 5, "graph"),
    ],
)
@pytest.mark.some_by_default(1)
def test_the_same_as_whole_batches_in_keras(net, micro, run):
    check_same(trained(net, micro, run), trained(net, None), 1e-11)


@pytest.mark.exhaustive
def test_micro_batches_by_themselves_are_not_the_same():
    """Were it otherwise, the test above would show nothing."""
    keras.utils.set_random_seed(5)
    net = chain()
    net.compile(keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3), "mse", jit_compile=False)
    net.fit(X[:24], Y[:24], batch_size=4, epochs=2, shuffle=False, verbose=0)
    keras.utils.set_random_seed(5)
    whole = chain()
    whole.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
    whole.fit(X[:24], Y[:24], batch_size=12, epochs=2, shuffle=False, verbose=0)
    apart = [np.abs(a - b).max() for a, b in zip(net.get_weights(), whole.get_weights(), strict=True)]
    assert max(apart) > 1e-3


@pytest.mark.exhaustive
def test_a_loss_over_the_window():
    def spread(y, outputs):
        return keras.ops.std(outputs - y) * keras.ops.ones(keras.ops.shape(y)[0])

    mine = trained("chain", 4, "graph", {"loss_over": "window"}, loss=spread)
    check_same(mine, trained("chain", None, loss=spread), 1e-10)


@pytest.mark.exhaustive
def test_half_precision():
    """Totals reach the layer as float32, with and without windows."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    net = keras.Sequential([keras.Input((5,)), Whitened(), Whitened()])
    assert {each.dtype for each in net.layers[1].flat_totals(tf.ones([3, 8], tf.bfloat16))} == {tf.float32, tf.int32}
    mine, its = trained("chain", 4, "graph"), trained("chain", None, "graph")
    check_same(mine, its, 2e-2)


def test_saved_and_loaded(tmp_path):
    net, _ = trained("chain", 4, "graph")
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), net.predict(X, verbose=0))


def test_inference_takes_the_sums_of_its_batch():
    layer = Share()
    given = [tf.constant([[1.0], [2.0]], tf.float64), tf.zeros([2, 1], tf.float64)]
    np.testing.assert_allclose(layer(given), [[0.5], [1.0]])


def compiled(net, **arguments):
    model = accumops.GradientAccumulateModel(net, **arguments)
    model.compile("sgd", "mse", jit_compile=False)
    return model


def test_accum_steps_are_refused():
    remedy = r"'first' is a CoupledLayer, and with accum_steps=2 .* Use `micro_batch_size`"
    with pytest.raises(ValueError, match=remedy):
        compiled(chain(), accum_steps=2)
    compiled(chain(), accum_steps=1).fit(X, Y, batch_size=13, verbose=0)


def test_code_that_nobody_can_cut_is_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.coupled, self.dense = Whitened(name="coupled"), L.Dense(2)

        def call(self, inputs):
            return self.dense(self.coupled(inputs))

    model = Own()
    model(X)
    with pytest.raises(ValueError, match=r"'coupled' is a CoupledLayer, and .* only the code of Own"):
        compiled(model, micro_batch_size=4)


class Rows(CoupledLayer):
    def totals(self, inputs):
        return inputs

    def combine(self, inputs, totals):
        return inputs


class Drawing(CoupledLayer):
    def totals(self, inputs):
        return keras.ops.sum(inputs, 0) + keras.random.uniform((5,), dtype=inputs.dtype)

    def combine(self, inputs, totals):
        return inputs + totals


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Rows, r"'wrong' has totals of shape .* must sum over the samples"), (Drawing, "global seed")],
)
def test_totals_that_are_none(layer, message):
    def train():
        net = keras.Sequential([keras.Input((5,)), L.Dense(5), layer(name="wrong"), L.Dense(2)])
        compiled(net, micro_batch_size=4).fit(X, Y, batch_size=13, verbose=0)

    with pytest.raises(ValueError, match=message):
        train()


@pytest.mark.parametrize("method", ["totals", "combine"])
def test_a_method_that_is_missing(method):
    given = {"totals": lambda self, inputs: keras.ops.sum(inputs, 0), "combine": lambda self, inputs, totals: inputs}
    del given[method]
    with pytest.raises(NotImplementedError, match=f"Half needs a method `{method}"):
        type("Half", (CoupledLayer,), given)()(tf.ones([2, 3]))


def test_a_search_for_the_size_of_micro_batches_is_refused():
    model = compiled(chain(), micro_batch_size=4)
    with pytest.raises(ValueError, match="'first' is a CoupledLayer: its windows keep tensors"):
        accumops.find_micro_batch_size(model, (X, Y), effective_batch_size=13)
