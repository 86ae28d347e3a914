"""Checks that the contenders of a window do the same work, and that the floor does all of it but the update."""

import collections
import dataclasses
import os
import sys
import types

import jax_training
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from accumops import GradientAccumulateModel, GradientAccumulateOptimizer
from accumops.benchmark import bandwidth, jax_scan, legacy, models, training, window
from accumops.planning.child_process import ChildProcess

SMALL = jax_training.SMALL
# Parts of the names of kernels that a backward pass runs.
BACKWARD = ("MatMul", "Conv2DBackprop", "FusedBatchNormGrad", "ReluGrad", "SoftmaxCrossEntropy")


def kernels(run):
    """Counts these kernels in the optimized graphs that TensorFlow runs for a function."""
    context.context().enable_graph_collection()
    try:
        run()
        graphs = context.context().export_run_metadata().function_graphs
    finally:
        context.context().disable_graph_collection()
    nodes = collections.Counter()
    for graph in graphs:
        optimized = graph.post_optimization_graph
        for node in [*optimized.node, *(node for each in optimized.library.function for node in each.node_def)]:
            nodes.update(kernel for kernel in BACKWARD if kernel in node.op)
    return nodes


def forward_and_nothing(model):
    """Drops gradients in a way that lets TensorFlow prune the backward pass."""
    compute = training.gradients_of(model)

    @tf.function
    def step(x, y):
        value, gradients = compute(x, y)
        with tf.control_dependencies([tf.convert_to_tensor(each) for each in gradients]):
            return tf.identity(value)

    return step


@pytest.mark.parametrize(
    "problem",
    [
        SMALL,
        models.PROBLEMS["convolutional network"],
        models.Problem("small table", models.bag_of_words(7, 3, 4), (4,), vocabulary=7),
        models.Problem("small transformer", models.transformer(7, 8, 4, 2, 1), (4,), vocabulary=7),
    ],
    ids=lambda problem: problem.name,
)
@pytest.mark.some_by_default(2)
def test_floor_has_the_whole_backward_pass(problem):
    x, y = problem.data(4)
    model = problem.build(keras)

    def count(step):
        return kernels(lambda: step(x, y))

    returned = count(training.forward_and_backward(model, drop=False))  # TensorFlow cannot prune what is returned
    dropped = count(training.forward_and_backward(model, drop=True))
    pruned = count(forward_and_nothing(model))
    assert dropped == returned
    assert pruned.total() < returned.total()
    in_one_call = kernels(training.forward_and_backward_in_one_call(model, x, y, 2))
    assert all(in_one_call[kernel] >= returned[kernel] for kernel in returned)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_contenders_train_alike(compiled):
    built = []

    def build(library):
        built.append(models.perceptron(5, 2)(library))
        return built[-1]

    contenders = window.contenders(dataclasses.replace(SMALL, build=build), "CPU", steps=4, micro=4)
    initial = built[0].get_weights()
    trained = {}
    for contender in contenders:
        if contender.name.endswith("XLA") and not compiled:
            continue
        run = contender.prepare()
        if contender.name != "accumops reference, accum_steps":  # `prepare` has already run that one
            run()
        trained[contender.name] = built[-1].get_weights()
    floors = {name for name in trained if name.startswith(window.FLOOR)}
    assert len(floors) == 2
    for name in floors:
        np.testing.assert_equal(trained[name], initial)
    for name in trained.keys() - floors:
        assert any((now != before).any() for now, before in zip(trained[name], initial, strict=True)), name
        for now, wanted in zip(trained[name], trained["written by hand"], strict=True):
            np.testing.assert_allclose(now, wanted, rtol=0, atol=1e-6, err_msg=name)


def test_a_turn_may_be_several_windows(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "hand_written", lambda *arguments: lambda: calls.append(1))
    contenders = window.contenders(dataclasses.replace(SMALL, windows=3), "CPU", steps=4, micro=2)
    [by_hand] = [contender for contender in contenders if contender.name == "written by hand"]
    by_hand.prepare()()
    assert len(calls) == by_hand.times == 3


def test_gpu_has_no_assertions():
    names = {contender.name for contender in window.contenders(SMALL, "GPU", steps=4, micro=2)}
    assert window.FLOOR in names
    assert f"{window.FLOOR}, in one call" not in names


def test_bytes_to_move():
    values = 5 * 5 + 5 + 5 * 5 + 5 + 5 * 10 + 10
    assert window.bytes_to_move(SMALL) == (8 + 12 + 12 + 4 + 28) * values


def test_all_problems_are_classifiers():
    for problem in models.PROBLEMS.values():
        x, y = problem.data(2)
        assert problem.build(keras).compute_output_shape(x.shape) == (2, models.CLASSES)
        assert y.shape == (2,)
        np.testing.assert_array_equal(x, problem.data(2)[0])


class InThisProcess:
    """Replaces the process that has Keras 2."""

    def __init__(self, environment):
        assert environment == {"TF_USE_LEGACY_KERAS": "1"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, **arguments):
        return function(**arguments)


@pytest.fixture
def stand_ins(monkeypatch):
    """Replaces the modules of Keras 2 and GradientAccumulator, with the members that the suite uses."""
    adam = keras.optimizers.Adam
    optimizers = types.SimpleNamespace(Adam=adam, legacy=types.SimpleNamespace(Adam=adam))
    library = types.SimpleNamespace(
        Input=keras.Input,
        Sequential=keras.Sequential,
        layers=keras.layers,
        losses=keras.losses,
        optimizers=optimizers,
    )
    package = types.SimpleNamespace(
        GradientAccumulateModel=GradientAccumulateModel, GradientAccumulateOptimizer=GradientAccumulateOptimizer
    )
    for name, module in {"gradient_accumulator": package, "tf_keras": library}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(legacy, "ChildProcess", InThisProcess)
    monkeypatch.setattr(legacy, "missing_package", lambda: None)
    monkeypatch.setattr(jax_scan, "missing_package", lambda: "jax")


@pytest.mark.usefixtures("stand_ins")
def test_gradient_accumulator(monkeypatch):
    monkeypatch.setitem(models.PROBLEMS, SMALL.name, dataclasses.replace(SMALL, windows=2, warmup=0))
    monkeypatch.setattr(window, "MODELS", (SMALL.name,))
    monkeypatch.setattr(window, "MICRO", 2)
    # One contender in this process is enough: the suite's own test runs all of them.
    contenders = window.contenders
    monkeypatch.setattr(window, "contenders", lambda *args, **kwargs: contenders(*args, **kwargs)[:1])
    monkeypatch.setattr(bandwidth, "_ARRAY_BYTES", 1 << 20)
    turns = []
    result = window.run(device="CPU", rounds=2, progress=lambda: turns.append(1))
    times = {row.name: row.milliseconds for row in result.rows}
    assert times["GradientAccumulator, model"] > 0
    assert times["GradientAccumulator, optimizer"] > 0
    assert any("GradientAccumulator runs on Keras 2" in footnote for footnote in result.footnotes)
    assert len(turns) == window.turns(2)


@pytest.mark.parametrize(("other", "missing"), [(legacy, "tf_keras"), (jax_scan, "optax")])
def test_missing_package_is_named(monkeypatch, other, missing):
    monkeypatch.setattr(other.importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert other.missing_package() == missing


@pytest.mark.skipif(jax_scan.missing_package() is not None, reason="jax or optax is not installed")
def test_jax_trains_as_keras_does():
    """In a process whose Keras runs on JAX. Both start with the same weights, and take two updates of Adam."""
    environment = {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with ChildProcess(environment) as process:
        before, after = process.call(jax_training.two_windows)
    model = SMALL.build(keras)
    model.set_weights([np.array(each, "float32") for each in before])
    model.compile(keras.optimizers.Adam(training.LEARNING_RATE), training.loss_function())
    for _ in range(2):
        model.train_on_batch(*SMALL.data(8))
    for ours, each in zip(model.get_weights(), after, strict=True):
        np.testing.assert_allclose(each, ours, rtol=0, atol=1e-5)  # updates of 1e-3
