"""Keras optimizers whose update is the fused op, against the same ones left to themselves."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross

import accumops
from accumops import GradientAccumulateOptimizer
from accumops.optimizer.clipping import AdaptiveGradientClipping

SHAPES = [(3, 4), (4,), (5, 2, 3), ()]
SCHEDULE = keras.optimizers.schedules.CosineDecay(0.01, 150, warmup_target=0.02, warmup_steps=20)
SETTINGS = {
    "SGD": (keras.optimizers.SGD, {}),
    "momentum": (keras.optimizers.SGD, {"momentum": 0.9}),
    "Nesterov": (keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD with decay": (keras.optimizers.SGD, {"weight_decay": 0.1}),
    "Adam": (keras.optimizers.Adam, {}),
    "Adam's other settings": (keras.optimizers.Adam, {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
    "AMSGrad": (keras.optimizers.Adam, {"amsgrad": True}),
    "AdamW": (keras.optimizers.AdamW, {"weight_decay": 0.1}),
    "AdamW with amsgrad": (keras.optimizers.AdamW, {"amsgrad": True}),
    "Lion": (keras.optimizers.Lion, {"weight_decay": 0.1}),
    "schedule": (keras.optimizers.AdamW, {"learning_rate": SCHEDULE}),
    "clipnorm": (keras.optimizers.Adam, {"clipnorm": 0.5}),
    "global_clipnorm": (keras.optimizers.AdamW, {"global_clipnorm": 0.5}),
    "clipvalue": (keras.optimizers.SGD, {"clipvalue": 0.2, "momentum": 0.5}),
    "moving averages": (keras.optimizers.Adam, {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7}),
    "static loss scale": (keras.optimizers.Adam, {"loss_scale_factor": 8.0}),
}


def make(name):
    kind, arguments = SETTINGS[name]
    return kind(**{"learning_rate": 0.01, **arguments})


def start_values(rng):
    return [rng.standard_normal(shape).astype("float32") for shape in SHAPES]


def assert_close(actual, expected, tolerance=1e-5, least=0.1):
    """Relative to the largest magnitude, or what `least` of it there is in the numbers that were added up."""
    for a, e in zip(actual, expected, strict=True):
        a, e = (np.asarray(each, "float64") for each in (a, e))
        assert np.abs(a - e).max(initial=0) <= tolerance * max(np.abs(e).max(initial=0), least), (a, e)


def check_against_the_optimizers_own(mode, rng, name, updates):
    start = start_values(rng)
    mine, theirs = ([keras.Variable(value, name=f"v{i}") for i, value in enumerate(start)] for _ in range(2))
    optimizer, plain = GradientAccumulateOptimizer(make(name), 2), make(name)
    for each in (optimizer, plain):
        each.exclude_from_weight_decay(var_names=["v1"])
    optimizer.build(mine)
    plain.build(theirs)
    assert optimizer.fused_update

    @mode
    def accumulated(first, second):
        optimizer.apply(first, mine)
        optimizer.apply(second, mine)

    # The plain optimizer as a function of TensorFlow: by XLA it is another one.
    @tf.function
    def whole(gradients):
        plain.apply(gradients, theirs)

    for _ in range(updates):
        # Noise with a direction, so that Lion's signs are not a matter of rounding.
        first, second = (
            [
                tf.constant(rng.standard_normal(shape) + 0.5 * value, tf.float32)
                for shape, value in zip(SHAPES, start, strict=True)
            ]
            for _ in range(2)
        )
        accumulated(first, second)
        whole([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    # Where Lion's direction is almost zero, the two may step in opposite directions.
    tolerance = 1e-5 if "Lion" not in name else 3e-2
    assert_close([v.numpy() for v in mine], [v.numpy() for v in theirs], tolerance)
    kept = optimizer.inner_optimizer.variables
    assert_close([v.numpy() for v in kept], [v.numpy() for v in plain.variables], max(tolerance, 3e-5))
    assert int(optimizer.iterations) == updates


# By default each setting runs in one mode. Compiled: rules, weight decay, a schedule, clipping by all variables and
# moving averages.
COMPILED = ["AMSGrad", "Lion", "schedule", "global_clipnorm", "moving averages"]
EAGER = ["SGD with decay", "Adam's other settings", "clipnorm"]


@pytest.mark.parametrize(
    ("mode", "name"),
    cross(
        ["eager", "graph", "xla"],
        SETTINGS,
        default=lambda mode, name: mode == "graph" and name not in (*COMPILED, *EAGER),
    ),
    indirect=["mode"],
)
@pytest.mark.some_by_default(2)
def test_100_updates_equal_the_optimizers_own(mode, rng, name):
    check_against_the_optimizers_own(mode, rng, name, updates=100)


@pytest.mark.parametrize(
    ("mode", "name"),
    cross(["eager", "xla"], SETTINGS, default=lambda mode, name: name in {"eager": EAGER, "xla": COMPILED}[mode]),
    indirect=["mode"],
)
@pytest.mark.some_by_default(1)
def test_30_updates_in_other_modes(mode, rng, name):
    """The warm-up of the schedule takes 20 of them."""
    check_against_the_optimizers_own(mode, rng, name, updates=30)


def test_which_updates_are_fused():
    class Own(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)

    class OwnClipping(keras.optimizers.Adam):
        def _clip_gradients(self, grads):
            return grads

    cases = {
        keras.optimizers.SGD(): "sgd",
        keras.optimizers.SGD(momentum=0.1): "momentum",
        keras.optimizers.SGD(momentum=0.1, nesterov=True): "nesterov",
        keras.optimizers.Adam(): "adam",
        keras.optimizers.AdamW(amsgrad=True): "amsgrad",
        keras.optimizers.Lion(): "lion",
        keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW()): "adam",
        keras.optimizers.Nadam(): "Nadam is none of SGD, Adam, AdamW and Lion",
        keras.optimizers.RMSprop(): "RMSprop is none of",
        Own(): "Own is none of",
        OwnClipping(): "OwnClipping has its own `_clip_gradients`",
    }
    for inner, expected in cases.items():
        fused = GradientAccumulateOptimizer(inner, 2).fused_update
        if fused:
            assert (fused.rule, str(fused)) == (expected, f"fused, by the rule '{expected}'")
        else:
            assert str(fused).startswith(f"not fused: {expected}")


def test_other_dtypes_and_backends_are_not_fused():
    optimizer = GradientAccumulateOptimizer("adam", 2)
    optimizer.build([keras.Variable(np.ones(3), dtype="float64", name="wide")])
    assert "'wide' is float64" in optimizer.fused_update.reason
    accumops.set_backend("reference")
    try:
        assert GradientAccumulateOptimizer("adam", 2).fused_update.reason == "the backend is 'reference'"
    finally:
        accumops.set_backend("auto")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.some_by_default(1)
@pytest.mark.exhaustive
def test_state_is_the_wrapped_optimizers(rng, scaled):
    """Trained with accumops, saved, and trained on without it."""
    values = rng.standard_normal((8, 3)).astype("float32")
    x, y = rng.standard_normal((16, 8)).astype("float32"), rng.standard_normal((16, 3)).astype("float32")

    def model(optimizer):
        made = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, use_bias=False)])
        made.layers[0].kernel.assign(values)
        made.compile(optimizer, "mse", jit_compile=False)
        return made

    inner = keras.optimizers.Adam(0.01)
    if scaled:
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    ours = model(GradientAccumulateOptimizer(inner, 2))
    ours.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0)
    assert ours.optimizer.fused_update
    plain = model(keras.optimizers.Adam(0.01))
    plain.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0)
    kept = inner.inner_optimizer if scaled else inner
    assert_close([v.numpy() for v in kept.variables], [v.numpy() for v in plain.optimizer.variables], 3e-5)
    ours.compile(kept, "mse", jit_compile=False)
    for each in (ours, plain):
        each.fit(x, y, batch_size=16, epochs=5, shuffle=False, verbose=0)
    assert_close(ours.get_weights(), plain.get_weights(), 3e-5)


def test_a_window_that_is_not_finite_is_dropped_by_loss_scaling(mode):
    variable = keras.Variable(np.ones(3, "float32"))
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=8.0)
    optimizer = GradientAccumulateOptimizer(inner, 2)
    optimizer.build([variable])

    @mode
    def step(gradient):
        optimizer.apply([gradient], [variable])

    for gradient in ([1.0, 2.0, 3.0], [np.inf, 1.0, 1.0]):
        step(tf.constant(gradient))
    np.testing.assert_array_equal(variable.numpy(), np.ones(3))
    assert (float(inner.dynamic_scale), int(optimizer.iterations)) == (4.0, 0)
    for _ in range(2):
        step(tf.constant([1.0, 2.0, 3.0]))
    assert int(optimizer.iterations) == 1
    np.testing.assert_allclose(variable.numpy(), np.full(3, 0.9), rtol=1e-5)


# Besides eagerly with the fused op, each setting runs in one or two of the other combinations.
ELSEWHERE = {
    ("fused", "graph"): ("AdamW", "global_clipnorm"),
    ("reference", "graph"): ("SGD",),
    ("reference", "xla"): (),
    ("fused", "xla"): ("clipnorm",),
    ("reference", "eager"): ("AdamW", "clipnorm", "global_clipnorm"),
}


@pytest.mark.parametrize(
    ("backend", "mode", "name"),
    cross(
        ["fused", "reference"],
        ["eager", "graph", "xla"],
        ["SGD", "AdamW", "clipnorm", "global_clipnorm"],
        default=lambda backend, mode, name: name in ELSEWHERE.get((backend, mode), SETTINGS),
    ),
    indirect=["backend", "mode"],
)
@pytest.mark.some_by_default(3)
def test_gradients_that_are_none_or_rows_in_some_micro_batches(backend, mode, rng, name):
    """The mean of a window over variables with dense, sparse and missing gradients."""
    table, other, never = (np.array(rng.standard_normal(shape), "float32") for shape in ((2000, 40), (7,), (3,)))
    start = [table, other, never]
    mine, theirs = ([keras.Variable(v, name=f"v{i}") for i, v in enumerate(start)] for _ in range(2))
    optimizer, plain = GradientAccumulateOptimizer(make(name), 3), make(name)
    optimizer.build(mine)
    plain.build(theirs)

    def step(rows, gradient, empty):
        slices = tf.IndexedSlices(tf.ones([2, 40]), rows)
        optimizer.apply([slices, None if empty else gradient, None], mine)

    # A gradient is None in a function or it is not.
    steps = [mode(lambda rows, gradient, empty=empty: step(rows, gradient, empty)) for empty in (False, True)]
    for _ in range(6):
        total = [np.zeros_like(table), np.zeros_like(other)]
        for i in range(3):
            rows, gradient = rng.integers(0, 2000, 2), rng.standard_normal(7).astype("float32")
            empty = i == 1
            steps[empty](tf.constant(rows), tf.constant(gradient))
            np.add.at(total[0], rows, 1)
            total[1] += 0 if empty else gradient
        plain.apply([tf.constant(t / 3) for t in total], theirs[:2])
    assert_close([v.numpy() for v in mine], [v.numpy() for v in theirs])


def test_a_window_of_one(backend, mode):
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 1)
    optimizer.build([variable])
    optimizer.accumulator.accumulators[0].assign([np.nan] * 3)

    @mode
    def step(gradient):
        optimizer.apply([gradient], [variable])

    step(tf.constant([1.0, 2.0, 3.0]))
    step(tf.constant([1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(variable.numpy(), [-1, -2, -3])


def test_weights_of_zero_change_nothing(backend, mode):
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([variable])

    @mode
    def step(gradient):
        optimizer.apply([gradient], [variable], weight=0.0)

    for _ in range(2):
        step(tf.constant([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(variable.numpy(), np.ones(3))
    assert int(optimizer.iterations) == 1


def test_an_update_that_fails_keeps_the_window(rng):
    """The last micro-batch is not counted then; a second try makes the update."""
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([variable])
    optimizer.apply([tf.constant([1.0, 1.0, 1.0])], [variable])
    with pytest.raises(ValueError):
        optimizer.apply([tf.constant([1.0, 1.0])], [variable])
    assert int(optimizer.accumulator.step) == 1
    optimizer.apply([tf.constant([3.0, 3.0, 3.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), np.full(3, -1.0))


@pytest.mark.some_by_default(2)
def test_adaptive_clipping_goes_into_the_fused_update(mode, rng):
    start = [rng.standard_normal((6, 4)).astype("float32"), rng.standard_normal(4).astype("float32")]
    mine, theirs = ([keras.Variable(v) for v in start] for _ in range(2))
    clip = AdaptiveGradientClipping(0.1)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.AdamW(0.01), 2, gradient_clipping=clip)
    plain = keras.optimizers.AdamW(0.01)
    optimizer.build(mine)
    plain.build(theirs)
    assert optimizer.fused_update

    @mode
    def step(*gradients):
        optimizer.apply(gradients, mine)

    for _ in range(20):
        gradients = [tf.constant(rng.standard_normal(v.shape), tf.float32) for v in start]
        for _ in range(2):
            step(*gradients)
        plain.apply(clip(gradients, theirs), theirs)
    assert_close([v.numpy() for v in mine], [v.numpy() for v in theirs])


def test_the_update_allocates_nothing_of_a_variables_size(rng):
    variable = keras.Variable(np.ones((512, 512), "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.AdamW(0.01), 2)
    optimizer.build([variable])
    function = tf.function(optimizer.flush).get_concrete_function()
    graphs = [function.graph, *(f.graph for f in function.graph._functions.values() if hasattr(f, "graph"))]
    assert len(graphs) > 1
    large = [t for graph in graphs for op in graph.get_operations() for t in op.outputs if t.shape == (512, 512)]
    assert not large
    # One float32 copy of the trainable variables, and counters.
    bytes_held = sum(np.prod(v.shape) * tf.as_dtype(v.dtype).size for v in optimizer.accumulator.variables)
    assert 0 <= bytes_held - 512 * 512 * 4 <= 64


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.1)])
@pytest.mark.parametrize("wrap", [GradientAccumulateOptimizer, lambda inner, steps: inner])
def test_an_optimizer_that_was_built_in_another_order(optimizer, wrap):
    """Each variable goes on with its own slots."""
    inner = type(optimizer).from_config(optimizer.get_config())
    a, b = keras.Variable([0.0, 0.0], name="a"), keras.Variable([0.0, 0.0], name="b")
    inner.build([a, b])
    inner.apply([tf.constant([1.0, 1.0]), tf.constant([-5.0, -5.0])], [a, b])
    before = a.numpy(), b.numpy()
    wrapped = wrap(inner, 1)
    wrapped.build([b, a])
    wrapped.apply([tf.zeros(2), tf.zeros(2)], [b, a])
    assert (a.numpy() < before[0]).all()  # by its momentum
    assert (b.numpy() > before[1]).all()


@pytest.mark.parametrize(
    "mode", [{"accum_steps": 2}, pytest.param({"micro_batch_size": 4}, marks=pytest.mark.exhaustive)]
)
@pytest.mark.exhaustive
def test_an_optimizer_that_was_built_for_more_variables(mode):
    """It goes on with the variables that are left when a layer is frozen."""
    x, y = np.ones((16, 3), "float32"), np.ones((16, 1), "float32")

    def train(wrap):
        keras.utils.set_random_seed(0)
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        model = wrap(net)
        size = 8 if "micro_batch_size" in mode or wrap is not accumulating else 4
        for trainable in (True, False):
            net.layers[0].trainable = trainable
            model.compile("adam" if trainable else model.optimizer, "mse", run_eagerly=wrap is not accumulating)
            model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
        return net.get_weights()

    def accumulating(net):
        return accumops.GradientAccumulateModel(net, **mode)

    for mine, plain in zip(train(accumulating), train(lambda net: net), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-6)


TENSORFLOW_VARIABLES = [
    ("eager", "SGD with decay"),
    ("graph", "Adam"),
    ("xla", "Lion"),
    ("eager", "global_clipnorm"),
    ("graph", "moving averages"),
]


@pytest.mark.parametrize(
    ("mode", "name"),
    cross(
        ["eager", "graph", "xla"],
        ["SGD with decay", "Adam", "Lion", "global_clipnorm", "moving averages"],
        default=lambda mode, name: (mode, name) in TENSORFLOW_VARIABLES,
    ),
    indirect=["mode"],
)
@pytest.mark.some_by_default(3)
def test_tensorflow_variables(mode, rng, name):
    start = start_values(rng)
    mine, theirs = ([tf.Variable(value) for value in start] for _ in range(2))
    optimizer, plain = GradientAccumulateOptimizer(make(name), 2), make(name)
    optimizer.build(mine)
    plain.build(theirs)
    assert optimizer.fused_update
    apply = mode(lambda gradients: optimizer.apply(gradients, mine))
    for _ in range(8):
        halves = [[tf.constant(each) for each in start_values(rng)] for _ in range(2)]
        for gradients in halves:
            apply(gradients)
        plain.apply([(a + b) / 2 for a, b in zip(*halves, strict=True)], theirs)
    assert_close(mine, theirs, 1e-4 if name == "Lion" else 1e-5)
