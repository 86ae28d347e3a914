"""Windows of a graph that only knows when it runs whether a micro-batch ends one: by flags of the ops.

They take the place of a condition around all variables. The condition, which other windows still have, says what the
bits are.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import cross, turns

import accumops
from accumops.adapters.tensorflow import operations_within
from accumops.optimizer.ending import Ending

SHAPES = [(3, 4), (4,), (5, 2, 3), ()]
SCHEDULE = keras.optimizers.schedules.CosineDecay(0.01, 15, warmup_target=0.02, warmup_steps=4)
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "Nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AMSGrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, clipvalue=0.5),
    "AdamW with a schedule": lambda: keras.optimizers.AdamW(SCHEDULE, weight_decay=0.1),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.5),
    "global_clipnorm": lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.5),
    "static loss scale": lambda: keras.optimizers.Adam(0.01, loss_scale_factor=8.0),
}
CONDITIONS = {"If", "StatelessIf", "While", "StatelessWhile", "Switch"}


@pytest.fixture
def conditionally(monkeypatch):
    """Returns a function that calls another one, in which no flags decide."""

    def call(function):
        with monkeypatch.context() as patched:
            patched.setattr(Ending, "_flags_decide", lambda self, batch: False)
            return function()

    return call


def captures(function, *signature):
    """How many tensors go into each condition of a function that is not within another one."""
    graph = function.get_concrete_function(*signature).graph
    return sorted(len(each.inputs) for each in graph.get_operations() if each.type in CONDITIONS)


def count(function, op, *signature):
    """How many operations of a type a function has outside of its conditions, and how many within."""
    graph = function.get_concrete_function(*signature).graph
    outside, everywhere = (
        [each.type for each in found].count(op) for found in (graph.get_operations(), operations_within(graph))
    )
    return outside, everywhere - outside


def draw(rng):
    return [tf.constant(rng.standard_normal(shape), tf.float32) for shape in SHAPES]


def step_of(optimizer, variables, **arguments):
    optimizer.build(variables)
    assert optimizer.fused_update
    return tf.function(lambda *given: optimizer.apply(given, variables, **arguments))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.some_by_default(3)
def test_no_condition_takes_the_variables(name, conditionally):
    def measure(shapes):
        variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
        optimizer = accumops.GradientAccumulateOptimizer(OPTIMIZERS[name](), 4)
        step = step_of(optimizer, variables)
        specs = [tf.TensorSpec(shape) for shape in shapes]
        return (
            captures(step, *specs),
            count(step, "AccumOps>Update", *specs),
            count(step, "AccumOps>Accumulate", *specs),
        )

    few = measure(SHAPES)
    assert few == measure(SHAPES * 5)
    assert few[1:] == ((1, 0), (1, 0))
    assert max(few[0]) <= 8
    assert max(conditionally(lambda: measure(SHAPES * 5))[0]) > 20  # so this test would see them


def test_no_condition_of_keras_own_step_takes_the_variables():
    def measure(depth):
        net = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8) for _ in range(depth))])
        net.compile(accumops.GradientAccumulateOptimizer("adam", 4), "mse", jit_compile=False)
        net.optimizer.build(net.trainable_variables)
        batch = tf.TensorSpec([None, 8])
        net.compute_loss(y=tf.zeros([2, 8]), y_pred=net(tf.zeros([2, 8])))
        return captures(tf.function(net.train_step), (batch, batch))

    assert measure(2) == measure(9)
    assert max(measure(2)) <= 8


def trained(rng_seed, make, steps, windows=6, **arguments):
    """The bits of variables, of an optimizer's own and of the window's count, after each micro-batch of a graph."""
    rng = np.random.default_rng(rng_seed)
    variables = [keras.Variable(rng.standard_normal(shape).astype("float32")) for shape in SHAPES]
    optimizer = accumops.GradientAccumulateOptimizer(make(), steps, **arguments)
    optimizer.build(variables)

    @tf.function
    def step(weight, *given):
        optimizer.apply(given, variables, weight=weight)

    seen = []
    for _ in range(4 * windows):
        step(tf.constant(rng.uniform(0, 2), tf.float32), *draw(rng))
        kept = [*variables, *optimizer.inner_optimizer.variables, optimizer.accumulator.state.counters.step]
        seen.append([each.numpy().tobytes() for each in kept])
    return seen


STEPS = {
    "every micro-batch": (1, {}),
    "4": (4, {}),
    "sums of 3": (3, {"reduction": "sum"}),
    "2, then 3": (lambda updates: tf.where(updates < 2, 2, 3), {}),
}
IN_TURNS = turns(OPTIMIZERS, STEPS)


@pytest.mark.parametrize(("name", "steps"), cross(OPTIMIZERS, STEPS, default=lambda *each: each in IN_TURNS))
@pytest.mark.some_by_default(3)
def test_the_bits_are_those_of_the_condition(conditionally, name, steps):
    """After each micro-batch, with weights, of the variables, the slots, the count of updates and the open window."""
    accum_steps, arguments = STEPS[steps]
    by_flags = trained(7, OPTIMIZERS[name], accum_steps, **arguments)
    by_condition = conditionally(lambda: trained(7, OPTIMIZERS[name], accum_steps, **arguments))
    assert by_flags == by_condition
    assert len({each[0] for each in by_flags}) > 5


@pytest.mark.parametrize("lazy_sparse", [False, True], ids=["", "lazy rows"])
@pytest.mark.parametrize("make", [OPTIMIZERS["SGD"], OPTIMIZERS["Adam"]], ids=["SGD", "Adam"])
def test_rows_are_added_and_updated_as_on_a_condition(conditionally, make, lazy_sparse):
    def train():
        rng = np.random.default_rng(3)
        table = keras.Variable(rng.standard_normal((2000, 40)).astype("float32"))
        weights = keras.Variable(rng.standard_normal((40, 3)).astype("float32"))
        optimizer = accumops.GradientAccumulateOptimizer(make(), 3, lazy_sparse=lazy_sparse)

        def apply(values, indices, dense):
            optimizer.apply([tf.IndexedSlices(values, indices), dense], [table, weights])

        optimizer.build([table, weights])
        step = tf.function(apply)
        seen = []
        for _ in range(9):
            values, dense = (tf.constant(rng.standard_normal(shape), tf.float32) for shape in ((5, 40), (40, 3)))
            step(values, tf.constant(rng.integers(0, 2000, 5), tf.int32), dense)
            kept = [table, weights, *optimizer.inner_optimizer.variables]
            seen.append([each.numpy().tobytes() for each in kept])
        signature = [tf.TensorSpec([5, 40]), tf.TensorSpec([5], tf.int32), tf.TensorSpec([40, 3])]
        return seen, max(captures(step, *signature)), count(step, "AccumOps>Update", *signature)

    by_flags, captured, updates = train()
    by_condition, captured_by_condition, _ = conditionally(train)
    assert by_flags == by_condition
    assert captured < captured_by_condition
    assert updates == (2, 0)


def fitted(batch_norm=False, **fit_arguments):
    """The bits of a model's variables after Keras's own fit on windows that are ragged at their end."""
    keras.utils.set_random_seed(5)
    rng = np.random.default_rng(5)
    layers = [keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)]
    if batch_norm:
        layers.insert(1, accumops.AccumBatchNormalization())
    net = keras.Sequential([keras.Input((5,)), *layers])
    net.compile(accumops.GradientAccumulateOptimizer("adam", 3), "mse", jit_compile=False)
    x, y = rng.standard_normal((46, 5)).astype("float32"), rng.standard_normal((46, 3)).astype("float32")
    history = net.fit(x, y, batch_size=8, epochs=4, verbose=0, **fit_arguments)
    kept = [*net.variables, *net.optimizer.inner_optimizer.variables]
    return [each.numpy().tobytes() for each in kept], history.history["loss"], int(net.optimizer.iterations)


@pytest.mark.parametrize("arguments", [{}, {"batch_norm": True}], ids=["", "batch normalization"])
@pytest.mark.some_by_default(1)
def test_keras_own_fit_has_the_bits_of_the_condition(conditionally, arguments):
    assert fitted(**arguments) == conditionally(lambda: fitted(**arguments))


def test_an_open_window_goes_on_elsewhere(conditionally):
    """From a graph with flags to one with the condition and back, by the optimizer's variables."""

    def make():
        variables = [keras.Variable(tf.ones(shape)) for shape in SHAPES]
        optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), 3)
        return step_of(optimizer, variables), [*variables, *optimizer.variables]

    whole, wanted = make()
    for i in range(8):
        whole(*draw(np.random.default_rng(i)))
    here, kept = make()
    there, theirs = make()
    for i in range(8):
        source, target = (kept, theirs) if i % 2 else (theirs, kept)
        for to, value in zip(target, source, strict=True):
            to.assign(value)
        if i % 2:
            conditionally(lambda i=i: there(*draw(np.random.default_rng(i))))
        else:
            here(*draw(np.random.default_rng(i)))
    for each, value in zip(theirs[: len(SHAPES)], wanted, strict=False):
        np.testing.assert_array_equal(each.numpy(), value.numpy())


@pytest.mark.parametrize("full", [False, True], ids=["in the window", "at its end"])
def test_a_micro_batch_that_fails_changes_nothing(full):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.1), 2 if full else 3)
    optimizer.build(variables)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def step(gradient):
        optimizer.apply([gradient, tf.ones([1])], variables)

    step(tf.ones([2]))
    kept = [*variables, *optimizer.variables]
    before = [each.numpy() for each in kept]
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.ones([3]))
    for each, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(each.numpy(), value)
    step(tf.ones([2]))
    assert int(optimizer.iterations) == full
    assert int(optimizer.accumulator.state.counters.step) == (0 if full else 2)


def test_a_schedule_is_asked_where_a_window_ends():
    """Once, as before: it may count or print."""
    asked = tf.Variable(0)

    @keras.saving.register_keras_serializable(package="test")
    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            asked.assign_add(1)
            return 0.1 / tf.cast(step + 1, tf.float32)

        def get_config(self):
            return {}

    variable = keras.Variable([1.0])
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(Schedule()), 3)
    step = step_of(optimizer, [variable])
    for i in range(9):
        step(tf.constant([1.0]))
        assert int(asked) == (i + 1) // 3
    np.testing.assert_allclose(variable.numpy(), [1 - 0.1 * (1 + 1 / 2 + 1 / 3)], rtol=1e-6)


def test_xla_may_compile_a_function_around_a_graph_with_flags():
    """The graph was traced before anybody could know."""

    def train(compiled):
        variables = [keras.Variable(tf.ones(shape)) for shape in SHAPES]
        optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.1), 3)
        step = step_of(optimizer, variables)
        rng = np.random.default_rng(11)
        step(*draw(rng))
        around = tf.function(lambda *given: step(*given), jit_compile=compiled)
        for _ in range(7):
            around(*draw(rng))
        assert step.experimental_get_tracing_count() == 1
        assert int(optimizer.iterations) == 2
        return [each.numpy() for each in [*variables, optimizer.accumulator.state.counters.step]]

    for compiled, plain in zip(train(True), train(False), strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5)


KEPT = {
    "moving averages": {"inner": lambda: keras.optimizers.Adam(0.01, use_ema=True)},
    "gradient_clipping": {"gradient_clipping": accumops.AdaptiveGradientClipping()},
    "nonfinite": {"nonfinite": "skip"},
    "a scaled loss": {"inner": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_acts_where_a_window_ends_keeps_the_condition(name):
    arguments = dict(KEPT[name])
    inner = arguments.pop("inner", OPTIMIZERS["Adam"])()
    variables = [keras.Variable(tf.zeros(shape)) for shape in SHAPES]
    optimizer = accumops.GradientAccumulateOptimizer(inner, 3, **arguments)
    step = step_of(optimizer, variables)
    assert count(step, "AccumOps>Update", *map(tf.TensorSpec, SHAPES)) == (0, 1)


def test_a_gradient_that_may_be_missing_keeps_the_condition():
    variables = [keras.Variable(tf.zeros(shape)) for shape in SHAPES]
    optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.Adam(0.01), 3)
    optimizer.build(variables)
    step = tf.function(lambda *given: optimizer.apply([*given, None], variables))
    assert count(step, "AccumOps>Update", *map(tf.TensorSpec, SHAPES[:-1]))[0] == 0
