"""Models that a window can be cut in all kinds of ways, against plain Keras on whole batches in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from random_graphs import RandomGraph
from whole_batches import SquaresLoss, check_same, train

import accumops

pytestmark = pytest.mark.usefixtures("float64")

L, ops = keras.layers, keras.ops
BN = L.BatchNormalization
SAMPLES = 19  # batches of 12 and 7, in micro-batches of 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(SAMPLES, 5)), RNG.normal(size=(SAMPLES, 2))
WORDS = RNG.integers(0, 9, (SAMPLES, 6))
SEQUENCES = RNG.normal(size=(SAMPLES, 6, 5))


def vector():
    return keras.Input((5,))


def block(units=5):
    return keras.Sequential([keras.Input((5,)), L.Dense(units), BN(), L.Activation("tanh")])


def nested():
    x = vector()
    return keras.Model(x, L.Dense(2)(BN()(block()(x)))), X, Y


def nested_in_nested():
    middle = keras.Sequential([keras.Input((5,)), block(), L.Dense(5)])
    return keras.Sequential([keras.Input((5,)), keras.Sequential([keras.Input((5,)), middle]), BN(), L.Dense(2)]), X, Y


def nested_called_twice():
    x, inner = vector(), block()
    return keras.Model(x, L.Dense(2)(inner(inner(x)))), X, Y


def nested_with_several_inputs_and_outputs():
    a, b = keras.Input((5,), name="a"), keras.Input((4,), name="b")
    hidden = BN()(L.Dense(4)(a))
    inner = keras.Model({"b": b, "a": a}, {"sum": hidden + BN()(b), "b": b, "hidden": hidden})
    x = vector()
    found = inner({"a": x, "b": L.Dense(4)(x)})
    return keras.Model(x, L.Dense(2)(BN()(L.Concatenate()([found["sum"], found["b"], found["hidden"]])))), X, Y


def nested_called_without_training():
    """Keras has the last word on what the argument means."""
    x, inner = vector(), block()
    return keras.Model(x, L.Dense(2)(BN()(inner(x, training=False)))), X, Y


def an_application_with_a_new_head():
    inputs = keras.Input((8, 8, 2))
    hidden = L.ReLU()(BN()(L.Conv2D(4, 3, strides=2)(inputs)))
    hidden = L.Add()([hidden, BN()(L.DepthwiseConv2D(3, padding="same")(hidden))])
    base = keras.Model(inputs, BN()(L.Conv2D(5, 1)(hidden)), name="base")
    x = keras.Input((8, 8, 2))
    hidden = L.Dense(6)(L.GlobalAveragePooling2D()(base(x / 2.0)))
    return keras.Model(x, L.Dense(2)(L.ReLU()(BN()(hidden)))), RNG.normal(size=(SAMPLES, 8, 8, 2)), Y


def a_frozen_base():
    net, x, y = an_application_with_a_new_head()
    net.get_layer("base").trainable = False
    return net, x, y


def frozen_parts():
    net = keras.Sequential([vector(), L.Dense(4), BN(), L.Dense(4), BN(), L.Dense(3), BN(), L.Dense(2)])
    for i in (0, 3, 4):
        net.layers[i].trainable = False
    return net, X, Y


def trained_norms_alone():
    net = keras.Sequential([vector(), L.Dense(4), BN(), L.Dense(4), BN(), L.Dense(2)])
    for layer in net.layers:
        layer.trainable = isinstance(layer, BN)
    return net, X, Y


def a_shared_norm():
    x, norm = vector(), BN(momentum=0.5)
    return keras.Model(x, L.Dense(2)(norm(L.Dense(5)(norm(L.Dense(5)(x)))))), X, Y


def a_shared_norm_in_branches_of_different_depth():
    """Moving statistics move in Keras's order of the calls, not in the order of the stages."""
    x, norm = vector(), BN(momentum=0.5)
    late = norm(L.Dense(5)(x) + 3.0)
    for _ in range(5):
        late = L.Activation("softsign")(late)
    early = BN()(norm(L.Dense(5)(x) - 3.0))
    return keras.Model(x, L.Dense(2)(late + early)), X, Y


def shared_layers():
    x, dense = vector(), L.Dense(5)
    return keras.Model(x, L.Dense(2)(dense(BN()(dense(BN()(dense(x))))))), X, Y


def outputs_from_the_middle():
    x = vector()
    norm = BN()(L.Dense(5)(x))
    hidden = L.Activation("tanh")(norm)
    late = BN()(L.Dense(5)(hidden))
    return keras.Model(x, [L.Dense(2)(hidden), hidden, L.Dense(2)(late), norm, late, x]), X, [Y, X, Y, X, X, X]


def an_output_without_a_loss():
    x = vector()
    hidden = BN()(L.Dense(4)(x))
    return keras.Model(x, [L.Dense(2)(hidden), BN()(L.Dense(2)(hidden))]), X, [Y, Y], {"loss": ["mse", None]}


def named_inputs_and_outputs():
    a, b = keras.Input((5,), name="a"), keras.Input((2,), name="b")
    one, other = BN()(L.Dense(6)(a)), BN()(b)
    both = BN()(L.Concatenate()([one, other]))
    outputs = {"u": L.Dense(2, name="u")(both), "v": L.Dense(1, name="v")(BN()(other))}
    settings = {"loss": {"u": "mse", "v": "mae"}, "loss_weights": {"u": 1.0, "v": 0.3}, "metrics": {"u": ["mae"]}}
    return keras.Model({"a": a, "b": b}, outputs), {"a": X, "b": X[:, :2]}, {"u": Y, "v": Y[:, :1]}, settings


def tensors_that_layers_hand_on():
    """The gradients of a tensor and of the same one behind a layer that returns it are not the same."""
    x = vector()
    hidden = BN()(L.Dense(5)(x))
    same = SquaresLoss()(hidden)
    late = BN()(L.Dense(5)(same))
    return keras.Model(x, L.Dense(2)(late * same + hidden * ops.tanh(same))), X, Y


def several_rows_for_a_sample():
    x = keras.Input((6, 5))
    rows = BN()(L.Dense(4)(ops.reshape(x, (-1, 5))))
    rows = BN()(L.Dense(3)(rows))
    return keras.Model(x, L.Dense(2)(L.Flatten()(BN()(ops.reshape(rows, (-1, 6, 3)))))), SEQUENCES, Y


def tensors_without_samples():
    words = keras.Input((6,), dtype="int32")
    positions = L.Embedding(6, 4)(ops.arange(6))
    hidden = BN()(L.Embedding(9, 4)(words) + positions)
    return keras.Model(words, L.Dense(2)(L.Flatten()((hidden + BN()(L.Dense(4)(hidden))) * positions))), WORDS, Y


def recurrent():
    x = keras.Input((6, 5))
    hidden, state = L.GRU(4, return_sequences=True, return_state=True, unroll=True)(BN()(x))
    hidden = L.LSTM(3, unroll=True)(BN()(hidden), initial_state=[L.Dense(3)(BN()(state))] * 2)
    return keras.Model(x, L.Dense(2)(BN()(hidden))), SEQUENCES, Y


def other_norms():
    x = keras.Input((6, 6, 4))
    hidden = L.LayerNormalization()(BN()(L.GroupNormalization(2)(L.Conv2D(4, 3)(x))))
    hidden = L.UnitNormalization()(BN(axis=1)(L.Conv2D(4, 2)(hidden)))
    return keras.Model(x, L.Dense(2)(L.Flatten()(hidden))), RNG.normal(size=(SAMPLES, 6, 6, 4)), Y


def embeddings():
    """One table in the first and in the last stage."""
    words, table = keras.Input((6,), dtype="int32"), L.Embedding(9, 4)
    return keras.Model(words, L.Dense(2)(L.Flatten()(BN()(table(words)) + table(words)))), WORDS, Y


def volumes():
    x = keras.Input((2, 3, 4, 2))
    return keras.Model(x, L.Dense(2)(L.Flatten()(BN()(L.Conv3D(3, 2)(x))))), RNG.normal(size=(SAMPLES, 2, 3, 4, 2)), Y


STRUCTURES = [
    nested,
    nested_in_nested,
    nested_called_twice,
    nested_with_several_inputs_and_outputs,
    nested_called_without_training,
    an_application_with_a_new_head,
    a_frozen_base,
    frozen_parts,
    trained_norms_alone,
    a_shared_norm,
    a_shared_norm_in_branches_of_different_depth,
    shared_layers,
    outputs_from_the_middle,
    an_output_without_a_loss,
    named_inputs_and_outputs,
    tensors_that_layers_hand_on,
    several_rows_for_a_sample,
    tensors_without_samples,
    recurrent,
    other_norms,
    embeddings,
    volumes,
]
TURNS = [("eager", 5, 1), ("eager", 4, 2), ("graph", 5, 2), ("eager", 12, 1), ("eager", 1, 100)]


@pytest.mark.parametrize(
    ("structure", "run", "micro", "every"),
    [
        *((each, *TURNS[i % 4]) for i, each in enumerate(STRUCTURES)),
        *(
            pytest.param(each, *turn, marks=pytest.mark.exhaustive)
            for i, each in enumerate(STRUCTURES)
            for turn in [*(turn for turn in TURNS if turn != TURNS[i % 4]), ("xla", 5, 1), ("xla", 12, 100)]
        ),
    ],
)
@pytest.mark.some_by_default(1)
def test_all_structures(structure, run, micro, every):
    keras.utils.set_random_seed(1)
    net, x, y, *rest = structure()
    settings = rest[0] if rest else {"loss": "mse" if not isinstance(y, list) else ["mse"] * len(y)}
    data = {"x": x, "y": y}
    check_same(train(net, data, micro=micro, every=every, run=run, **settings), train(net, data, **settings))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(6, 120))])
@pytest.mark.some_by_default(1)
def test_random_graphs(seed):
    graph, rng = RandomGraph(seed), np.random.default_rng(seed)
    micro, every = int(rng.choice([1, 3, 5, 12])), int(rng.choice([1, 2, 3, 100]))
    model = {"loss_over": "window"} if rng.random() < 0.25 else {}
    run = ("eager", "graph", "eager", "xla")[seed % 4] if seed >= 6 else "eager"
    data = {"x": graph.x, "y": graph.y}
    settings = {"loss": graph.loss, "optimizer": lambda: keras.optimizers.SGD(0.02, momentum=0.9)}
    trained = train(graph.net, data, micro=micro, every=every, run=run, model=model, **settings)
    check_same(trained, train(graph.net, data, **settings), atol=1e-10)


@pytest.mark.parametrize("model", [{}, {"loss_over": "window"}], ids=["each micro-batch", "the window"])
@pytest.mark.parametrize("run", ["graph", pytest.param("eager", marks=pytest.mark.exhaustive)])
def test_losses_see_the_logits_of_probabilities(model, run):
    """Keras's losses would cut off the logarithms of probabilities below 1e-7."""
    keras.utils.set_random_seed(1)
    last = L.Dense(4, "softmax", kernel_initializer=keras.initializers.RandomNormal(stddev=30.0))
    net = keras.Sequential([keras.Input((5,)), L.Dense(4, tf.nn.sigmoid), BN(), last])
    data = {"x": X, "y": np.arange(len(X)) % 4}
    wanted = train(net, data, run=run, loss="sparse_categorical_crossentropy")
    check_same(train(net, data, micro=5, run=run, model=model, loss="sparse_categorical_crossentropy"), wanted)


def test_a_sequential_model_that_its_data_builds():
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((5,)), L.Dense(4), BN(), L.Dense(2)])
    wanted = train(net, {"x": X, "y": Y})
    layers = [L.Dense(4), accumops.AccumBatchNormalization(statistics="window"), L.Dense(2)]
    unbuilt = keras.Sequential(layers)
    model = accumops.GradientAccumulateModel(unbuilt, micro_batch_size=5)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    model.build((None, 5))
    unbuilt.set_weights(net.get_weights())
    model.fit(X, Y, batch_size=12, shuffle=False, verbose=0)
    for mine, its in zip(unbuilt.get_weights(), wanted.net.get_weights(), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-11)


def test_ragged_tensors():
    """A normalization of all valid rows, which the samples of a window have different numbers of."""
    lengths = RNG.integers(1, 5, 12)
    x = tf.RaggedTensor.from_row_lengths(RNG.normal(size=(lengths.sum(), 5)), lengths)
    y = RNG.normal(size=(12, 2))

    def network(statistics):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((None, 5), ragged=True)
        hidden = accumops.AccumBatchNormalization(statistics=statistics)(inputs)
        hidden = L.Lambda(lambda rows: tf.reduce_sum(rows, 1), output_shape=(5,))(hidden)
        return keras.Model(inputs, L.Dense(2)(accumops.AccumBatchNormalization(statistics=statistics)(hidden)))

    wanted = network("micro_batch")
    wanted.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    wanted_loss = wanted.train_on_batch(x, y)
    net = network("window")
    model = accumops.GradientAccumulateModel(net, micro_batch_size=5)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    assert model.train_on_batch(x, y) == pytest.approx(wanted_loss, rel=1e-9)
    for mine, its in zip(net.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-9)
