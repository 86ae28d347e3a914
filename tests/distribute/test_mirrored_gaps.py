"""Variables that a window has no gradient for, on replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import check_replicas_are_equal, mirrored

import accumops

pytestmark = pytest.mark.usefixtures("logical_devices")

OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.2),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.1, momentum=0.5, weight_decay=0.2),
}
WINDOWS = ["ab ab", "a a", "a ab", "ab a"]


def variables():
    return [keras.Variable(np.full(3, value, "float32"), name=name) for name, value in (("a", 2.0), ("b", 1.0))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_running_graph_knows_the_window(name):
    plain, plain_optimizer = variables(), OPTIMIZERS[name]()
    plain_optimizer.build(plain)
    strategy = mirrored(2)
    with strategy.scope():
        trained = variables()
        optimizer = accumops.GradientAccumulateOptimizer(OPTIMIZERS[name](), 2)
        optimizer.build(trained)
    assert bool(optimizer.fused_update) == (name == "AdamW")

    def function_of(names):
        chosen = [each for each in trained if each.name in names]

        @tf.function
        def step(gradient):
            strategy.run(lambda: optimizer.apply([gradient / 2] * len(chosen), chosen))

        return step

    steps = {names: function_of(names) for names in ("a", "ab")}
    for number, window in enumerate(WINDOWS):
        calls = window.split()
        for names in calls:
            steps[names](tf.fill([3], number + 1.0))
        given = [each for each in plain if each.name in "".join(calls)]
        share = {each.name: sum(each.name in names for names in calls) / 2 for each in given}
        plain_optimizer.apply([tf.fill([3], (number + 1.0) * share[each.name]) for each in given], given)
    for wanted, found in zip(
        [*plain, *plain_optimizer.variables], [*trained, *optimizer.inner_optimizer.variables], strict=True
    ):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5, err_msg=wanted.path)
    check_replicas_are_equal([*trained, *optimizer.inner_optimizer.variables])


def test_disjoint_parts_in_one_window_are_an_error():
    strategy = mirrored(2)
    with strategy.scope():
        a, b = variables()
        optimizer = accumops.GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
        optimizer.build([a, b])

    @tf.function
    def step(gradient):
        for variable in (a, b):
            strategy.run(lambda variable=variable: optimizer.apply([gradient], [variable]))

    with pytest.raises(tf.errors.InvalidArgumentError, match="of b only, and no other call of the window gave any"):
        step(tf.ones([3]))
    np.testing.assert_array_equal(b.numpy(), [1, 1, 1])
