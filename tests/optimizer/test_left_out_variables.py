"""Variables that a window has no gradient for: as in plain Keras they stay where they are."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from crosses import turns

from accumops import AdaptiveGradientClipping, GradientAccumulateOptimizer

NAMES = "abc"
OPTIMIZERS = {
    "momentum": lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, **kw),
    "Adam": lambda **kw: keras.optimizers.Adam(0.1, amsgrad=True, **kw),
    "AdamW": lambda **kw: keras.optimizers.AdamW(0.1, weight_decay=0.2, **kw),
    "Lion": lambda **kw: keras.optimizers.Lion(0.1, weight_decay=0.2, **kw),
    "SGD": lambda **kw: keras.optimizers.SGD(0.1, weight_decay=0.2, **kw),
    "RMSprop": lambda **kw: keras.optimizers.RMSprop(0.1, momentum=0.5, weight_decay=0.2, **kw),
    "Nadam": lambda **kw: keras.optimizers.Nadam(0.1, **kw),
    "Adafactor": lambda **kw: keras.optimizers.Adafactor(0.1, **kw),
    "Adagrad": lambda **kw: keras.optimizers.Adagrad(0.1, **kw),
    "Adadelta": lambda **kw: keras.optimizers.Adadelta(0.1, **kw),
    "Adamax": lambda **kw: keras.optimizers.Adamax(0.1, **kw),
    "Ftrl": lambda **kw: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01, **kw),
    "Lamb": lambda **kw: keras.optimizers.Lamb(0.1, **kw),
    "Muon": lambda **kw: keras.optimizers.Muon(0.1, exclude_layers=["b"], weight_decay=0.2, **kw),
    "ScheduleFreeAdamW": lambda **kw: keras.optimizers.ScheduleFreeAdamW(0.1, **kw),
}
SETTINGS = {
    "none": {},
    "weight_decay": {"weight_decay": 0.3},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.7},
    "clipvalue": {"clipvalue": 0.3},
    "ema": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2},
    "loss_scale_factor": {"loss_scale_factor": 4.0},
}
MODES = {"eager": lambda f: f, "graph": tf.function, "xla": lambda f: tf.function(f, jit_compile=True)}
# Windows of calls. A capital letter is a variable with a gradient, a small one a variable that is given with None.
WINDOWS = {
    1: ["ABC", "AB", "Ab", "C", "bC", "ABC"],
    2: ["ABC ABC", "A A", "AB BC", "ABC B", "B ABC", "Ab Ab", "AB AC", "C C", "Abc aBc", "A Ac", "BA A"],
    3: ["AB AC A", "AC AB BC", "B B BC", "Ac A A", "C C C", "ABC A B"],
}


def variables():
    values = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (4,), "c": (2, 3)}
    limit = keras.constraints.MaxNorm(0.9)
    made = [keras.Variable(values.standard_normal(shapes[n]).astype("float32"), name=n) for n in NAMES]
    for variable in made[1:]:
        variable.constraint = limit
    return made


def calls_of(windows):
    """For each window its calls, each a dict of gradients by name."""
    values = np.random.default_rng(1)
    shapes = {variable.name: tuple(variable.shape) for variable in variables()}

    def gradient(letter):
        value = values.standard_normal(shapes[letter.lower()]).astype("float32")
        return tf.constant(value) if letter.isupper() else None

    return [[{each.lower(): gradient(each) for each in call} for call in window.split()] for window in windows]


def train_plainly(optimizer, windows):
    """Makes the updates of the large batches, whose gradients are the means over the windows' calls."""
    trained = variables()
    optimizer.build(trained)
    for calls in windows:
        gradients = {}
        for variable in trained:
            given = [call[variable.name] for call in calls if variable.name in call]
            values = [each for each in given if each is not None]
            if given:
                gradients[variable.name] = sum(values[1:], values[0]) / len(calls) if values else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.apply(list(gradients.values()), [v for v in trained if v.name in gradients])
    return trained


def train(optimizer, windows, mode, *, flush=False):
    """Makes the same updates call by call; each set of variables has a trace of its own."""
    trained = {variable.name: variable for variable in variables()}
    optimizer.build(list(trained.values()))
    steps = {}
    end = mode(optimizer.flush)

    def step_of(call):
        kind = tuple((name, gradient is not None) for name, gradient in call.items())
        if kind not in steps:

            def step(gradients):
                rest = iter(gradients)
                given = [next(rest) if there else None for _, there in kind]
                take = optimizer.accumulate if flush else optimizer.apply
                take(given, [trained[name] for name, _ in kind])

            steps[kind] = mode(step)
        return steps[kind]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for calls in windows:
            for call in calls:
                step_of(call)([gradient for gradient in call.values() if gradient is not None])
            if flush:
                end()
    return list(trained.values())


def check_equal(plain, accumulated, plain_optimizer, optimizer):
    state = zip(plain_optimizer.variables, optimizer.variables, strict=False)  # then the window's
    for wanted, found in [*zip(plain, accumulated, strict=True), *state]:
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=2e-6, rtol=1e-5, err_msg=wanted.path)


def compare(name, setting, windows, mode, **arguments):
    steps, windows = len(windows[0].split()), calls_of(windows)
    plain_optimizer = OPTIMIZERS[name](**SETTINGS[setting])
    optimizer = GradientAccumulateOptimizer(OPTIMIZERS[name](**SETTINGS[setting]), steps)
    plain = train_plainly(plain_optimizer, windows)
    check_equal(plain, train(optimizer, windows, mode, **arguments), plain_optimizer, optimizer)
    assert int(optimizer.iterations) == len(windows)


@pytest.mark.parametrize(("name", "setting"), turns(OPTIMIZERS, SETTINGS))
@pytest.mark.some_by_default(8)
def test_every_optimizer_as_in_keras(name, setting):
    """With `accum_steps=1` each call is an update of Keras's."""
    compare(name, setting, WINDOWS[1], MODES["eager"])


@pytest.mark.parametrize(
    ("mode", "name", "setting", "windows", "flush"),
    [
        ("eager", "momentum", "global_clipnorm", WINDOWS[2], False),
        ("eager", "RMSprop", "ema", WINDOWS[3], True),
        pytest.param(
            "graph", "momentum", "global_clipnorm", ["A A", "AB BC", "BC AB"], False, marks=pytest.mark.exhaustive
        ),
        ("graph", "Adam", "ema", ["AB AB", "ABC AB"], True),
        ("graph", "Muon", "none", ["A A", "AB A"], False),
        ("xla", "AdamW", "clipnorm", ["A A", "A AB", "AB A"], False),
    ],
)
@pytest.mark.some_by_default(2)
def test_windows_with_gaps(mode, name, setting, windows, flush):
    """In a graph each set of variables has a trace of its own, and any of them may end any window."""
    compare(name, setting, windows, MODES[mode], flush=flush)


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "setting"), turns([*OPTIMIZERS] * 2, SETTINGS))
def test_windows_with_gaps_of_every_optimizer(backend, mode, name, setting, steps):
    compare(name, setting, WINDOWS[steps], MODES[mode], flush=steps == 3)


class WholeSteps(keras.optimizers.SGD):
    """An optimizer that does not step variable by variable."""

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(self.learning_rate * (gradient + 1))
        self.iterations.assign_add(1)


def test_an_apply_of_its_own():
    """In a graph it gets all variables or those of the last call; of other windows it has to be told."""
    windows = calls_of(["AB AB", "AB ABC", "ABC AB", "AB AB"])
    plain = train_plainly(WholeSteps(0.1), windows)
    optimizer = GradientAccumulateOptimizer(WholeSteps(0.1), 2)
    check_equal(plain, train(optimizer, windows, tf.function), optimizer.inner_optimizer, optimizer)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"WholeSteps has an `apply` of its own"):
        train(GradientAccumulateOptimizer(WholeSteps(0.1), 3), calls_of(["AB A A"]), tf.function)


@pytest.mark.parametrize(("mode", "scaled"), [("eager", False), ("graph", True)])
@pytest.mark.some_by_default(1)
def test_clipped_and_scaled(mode, scaled):
    """With `gradient_clipping`, and with a LossScaleOptimizer inside."""
    windows = calls_of(["AB AB", "ABC AB", "AB AB"])
    clip = AdaptiveGradientClipping(0.3)

    class Clipped(keras.optimizers.Adam):
        def apply(self, grads, trainable_variables=None):
            super().apply(clip(grads, trainable_variables), trainable_variables)

    plain = train_plainly(Clipped(0.1), windows)
    inner = keras.optimizers.Adam(0.1)
    if scaled:
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
        windows = [[{n: None if g is None else g * 4 for n, g in call.items()} for call in calls] for calls in windows]
    optimizer = GradientAccumulateOptimizer(inner, 2, gradient_clipping=clip)
    for wanted, found in zip(plain, train(optimizer, windows, MODES[mode]), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_lazy_rows(fused):
    """A table that a window leaves out keeps all of its rows, whatever the last window touched."""
    table, other = (keras.Variable(np.ones(shape, "float32")) for shape in ((6, 2), (3,)))
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.1) if fused else keras.optimizers.RMSprop(0.1, momentum=0.9)
    optimizer = GradientAccumulateOptimizer(inner, 2, lazy_sparse=True)
    optimizer.build([table, other])
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 4]), tf.constant([6, 2]))

    @tf.function
    def both():
        optimizer.apply([rows, tf.ones(3)], [table, other])

    @tf.function
    def one():
        optimizer.apply([tf.ones(3)], [other])

    both()
    both()
    before, other_before = table.numpy(), other.numpy()
    one()
    one()
    np.testing.assert_array_equal(table.numpy(), before)
    assert (other.numpy() != other_before).all()
    both()
    one()
    assert (table.numpy() != before).any(axis=1).tolist() == [False, True, False, False, True, False]


def trunk_and_heads():
    keras.utils.set_random_seed(2)
    make = keras.layers.Dense
    layers = [make(4, "tanh", dtype="float64"), make(1, dtype="float64"), make(1, dtype="float64")]
    for layer, width in zip(layers, (3, 4, 4), strict=True):
        layer.build((None, width))
    return layers


def loss_of(layers, head, x, y):
    trunk = layers[0](x)
    return tf.reduce_sum((layers[1 + head](trunk) - y) ** 2)


@pytest.mark.parametrize(("mode", "explicit"), [("eager", True), ("graph", False)])
@pytest.mark.some_by_default(1)
def test_two_heads_in_turns_have_the_joint_mean(mode, explicit):
    """A sample whose loss does not depend on a head adds zero to the head's mean, and is counted."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((3, 24, 3)), rng.standard_normal((3, 24, 1))
    plain, layers = trunk_and_heads(), trunk_and_heads()

    def trained(layers, chosen=(0, 1, 2)):
        return [variable for i in chosen for variable in layers[i].trainable_variables]

    plain_optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    plain_optimizer.build(trained(plain))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), 4)
    optimizer.build(trained(layers))

    def step(head, x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(layers, head, x, y) / 6
        variables = trained(layers, (0, 1, 2) if explicit else (0, 1 + head))
        optimizer.apply(tape.gradient(loss, variables), variables)

    step = MODES[mode](step)
    for window in range(3):
        # The first head has 18 samples of the large batch, the second one 6.
        with tf.GradientTape() as tape:
            loss = loss_of(plain, 0, x[window, :18], y[window, :18]) + loss_of(plain, 1, x[window, 18:], y[window, 18:])
            loss /= 24
        plain_optimizer.apply(tape.gradient(loss, trained(plain)), trained(plain))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, head in enumerate((0, 0, 0, 1)):
                part = slice(6 * i, 6 * i + 6)
                step(head, tf.constant(x[window, part]), tf.constant(y[window, part]))
    for wanted, found in zip(trained(plain), trained(layers), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_disjoint_parts_in_one_window_are_an_error(steps):
    a, b, c = variables()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), steps)
    optimizer.build([a, b, c])
    before = [each.numpy() for each in (a, b, c)]
    optimizer.apply([tf.ones(a.shape)], [a])
    if steps == 1:  # each call is a window
        optimizer.apply([tf.ones(b.shape)], [b])
        assert int(optimizer.iterations) == 2
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of b, c only, and no other call of the window gave any"):
            optimizer.apply([tf.ones(b.shape), tf.ones(c.shape)], [b, c])
    assert int(optimizer.accumulator.step) == 1
    for value, each in zip(before, (a, b, c), strict=True):
        np.testing.assert_array_equal(each.numpy(), value)
    for _ in range(steps - 1):
        optimizer.apply([tf.ones(a.shape), tf.ones(b.shape)], [a, b])
    assert int(optimizer.iterations) == 1
    np.testing.assert_allclose(a.numpy(), before[0] - 1, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_disjoint_parts_in_one_trace_are_an_error(jit_compile):
    a, b, c = variables()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([a, b, c])

    @tf.function(jit_compile=jit_compile)
    def step():
        optimizer.apply([tf.ones(a.shape)], [a])
        optimizer.apply([tf.ones(b.shape)], [b])

    with pytest.raises(ValueError, match=r"of b only, and no other call of the window gave any"):
        step()
    assert int(optimizer.accumulator.step) == 0


def test_parts_may_have_windows_in_turns_in_one_trace():
    a, b, c = variables()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([a, b, c])

    @tf.function
    def windows():
        for _ in range(2):
            optimizer.apply([tf.ones(a.shape)], [a])
        optimizer.accumulate([tf.ones(b.shape)], [b])

    windows()
    assert int(optimizer.iterations) == 1
    with pytest.raises(ValueError, match="of a only"):
        windows.python_function()  # eagerly
    with pytest.raises(ValueError, match="of a only"):
        tf.function(windows.python_function)()
    optimizer.flush()
    windows()
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize(
    "call", ["apply", *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("accumulate", "close"))]
)
def test_disjoint_parts_of_two_functions_are_an_error(call):
    """Only the graph that runs knows it, and nothing has changed."""
    a, b, c = variables()
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([a, b, c])
    first = tf.function(lambda: optimizer.apply([tf.ones(a.shape)], [a]))
    second = tf.function(lambda: getattr(optimizer, call)([tf.ones(b.shape)], [b]))
    for function in (second, first):  # traced where each is the first of its window
        function()
        optimizer.flush()
    before = [each.numpy() for each in (a, b, c, *optimizer.variables)]
    first()
    after = [each.numpy() for each in (a, b, c, *optimizer.variables)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"of b only, and no other call of the window gave any"):
        second()
    for wanted, each in zip(after, (a, b, c, *optimizer.variables), strict=True):
        np.testing.assert_array_equal(each.numpy(), wanted)
    first()
    np.testing.assert_allclose(a.numpy(), before[0] - 1, rtol=1e-6)
    np.testing.assert_array_equal(b.numpy(), before[1])


@pytest.mark.parametrize(("mode", "steps"), [("eager", 2), ("graph", 1)])
def test_the_warning_is_keras_own(mode, steps):
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), steps)
    a, b, c = variables()
    optimizer.build([a, b, c])
    ones = [tf.ones(each.shape) for each in (a, b, c)]

    @MODES[mode]
    def full():
        optimizer.apply(ones, [a, b, c])

    @MODES[mode]
    def part():
        for _ in range(steps):
            optimizer.apply([ones[0], None, None], [a, b, c])

    @MODES[mode]
    def left_out():
        optimizer.apply([ones[0]], [a])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            full()
            left_out()
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b', 'c'\] when minimizing"):
        part()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out()


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_window_with_gaps_is_saved(in_graph, tmp_path):
    """What the open window has no gradient for is known in the process that goes on with it."""
    windows = calls_of(["ABC ABC ABC", "AB Ac A"])

    def make():
        optimizer, trained = GradientAccumulateOptimizer(keras.optimizers.Adam(0.1), 3), variables()
        optimizer.build(trained)
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, **{v.name: v.value for v in trained})
        return optimizer, {v.name: v for v in trained}, checkpoint

    def run(optimizer, trained, calls):
        for call in calls:
            optimizer.apply(list(call.values()), [trained[name] for name in call])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, trained, checkpoint = make()
        run(optimizer, trained, windows[0] + windows[1][:2])
        path = checkpoint.save(str(tmp_path / "checkpoint"))
        run(optimizer, trained, windows[1][2:])
        goes_on, restored, checkpoint = make()
        checkpoint.restore(path)
        last = windows[1][2]["a"]
        step = lambda gradient: goes_on.apply([gradient], [restored["a"]])  # noqa: E731
        (tf.function(step) if in_graph else step)(last)
    for name, variable in trained.items():
        np.testing.assert_array_equal(restored[name].numpy(), variable.numpy())
    for wanted, found in zip(optimizer.inner_optimizer.variables, goes_on.inner_optimizer.variables, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())
