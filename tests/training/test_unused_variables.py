"""Models with variables that no loss depends on: they stay where they are, as in plain Keras."""

import warnings

import keras
import numpy as np
import pytest
from crosses import cross

from accumops import GradientAccumulateModel

MODES = {"accum_steps": ({"accum_steps": 4}, 8), "micro_batch_size": ({"micro_batch_size": 12}, 32)}
RUNS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
OPTIMIZERS = {
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.3, global_clipnorm=0.5),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, weight_decay=0.3),
}


@keras.saving.register_keras_serializable("accumops_tests")
class WithUnused(keras.Model):
    """A network with a layer that its loss does not depend on."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.used, self.unused = keras.layers.Dense(3), keras.layers.Dense(2, bias_initializer="ones")

    def call(self, inputs):
        self.unused(inputs)
        return self.used(inputs)


def make():
    keras.utils.set_random_seed(5)
    model = WithUnused()
    model(np.zeros((1, 4), "float32"))
    return model


@pytest.mark.parametrize(
    ("mode", "run", "name"),
    cross(
        MODES,
        RUNS,
        OPTIMIZERS,
        default=lambda mode, run, name: (
            (mode, run, name) in (("accum_steps", "graph", "AdamW"), ("micro_batch_size", "graph", "RMSprop"))
        ),
    ),
)
@pytest.mark.some_by_default(1)
def test_a_layer_without_gradients(mode, run, name):
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((80, 4)).astype("float32"), rng.standard_normal((80, 3)).astype("float32")  # 2.5 windows
    plain, trained = make(), make()
    start = [each.numpy() for each in trained.unused.variables]
    plain.compile(OPTIMIZERS[name](), "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    arguments, batch_size = MODES[mode]
    model = GradientAccumulateModel(trained, **arguments)
    model.compile(OPTIMIZERS[name](), "mse", **RUNS[run])
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables .*dense"):
        model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 6
    for value, each in zip(start, trained.unused.variables, strict=True):
        np.testing.assert_array_equal(each.numpy(), value)
    for wanted, found in zip(plain.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
