"""What accumops relies on in the installed Keras and TensorFlow without a promise of theirs."""

import keras
import pytest

from accumops.adapters import keras_layer, keras_optimizer, upstream

NAMES = {name.path: name for name in upstream.relied_on()}


@pytest.fixture
def without_weight_decay(monkeypatch):
    """A Keras whose optimizers have no `_use_weight_decay`."""
    owner = next(kind for kind in keras.optimizers.Optimizer.__mro__ if "_use_weight_decay" in vars(kind))
    monkeypatch.delattr(owner, "_use_weight_decay")


@pytest.mark.parametrize("path", NAMES)
def test_name_is_there(path):
    problem = NAMES[path].problem()
    assert problem is None, problem


def test_nothing_is_missing():
    assert upstream.missing() == []


@pytest.mark.usefixtures("without_weight_decay")
def test_a_name_that_is_gone_is_named_with_what_it_costs():
    problems = upstream.missing()
    assert problems
    for problem in problems:
        assert f"Keras {keras.__version__}" in problem
        assert "have no `keras.optimizers.Optimizer._use_weight_decay`" in problem
    assert any("weight decay in fused updates and lazy rows" in problem for problem in problems)


def test_another_signature_is_a_problem(monkeypatch):
    monkeypatch.setattr(keras.optimizers.Optimizer, "_get_variable_index", lambda self: 0)
    (problem,) = set(upstream.missing())
    assert "`keras.optimizers.Optimizer._get_variable_index`" in problem
    assert "does not take (variable)" in problem


@pytest.mark.usefixtures("without_weight_decay")
def test_a_use_of_a_name_that_is_gone_says_so():
    """Instead of an AttributeError from somewhere in a training step."""
    optimizer = keras.optimizers.Adam()
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    with pytest.raises(upstream.UpstreamError, match=r"no `keras\.optimizers\.Optimizer\._use_weight_decay`"):
        keras_optimizer.decays(optimizer, variable)


def test_other_attribute_errors_pass():
    """Only a declared name that is gone becomes an UpstreamError."""

    class Layer:
        def _flatten_layers(self, **_):
            return self.something_else

    with pytest.raises(AttributeError, match="something_else"):
        keras_layer.layers_within(Layer())
