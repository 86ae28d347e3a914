"""Private names of Keras and TensorFlow stand in `accumops/adapters` only.

The linter finds `other._name`. Here is what it cannot see: members of a base class through `self`, names in strings and
keywords, methods that override private ones, and imports.
"""

import ast
import pathlib

import keras
import pytest
import tensorflow as tf

import accumops

ROOT = pathlib.Path(accumops.__file__).parent
FILES = [path for path in ROOT.rglob("*.py") if "adapters" not in path.parts]
BASES = (
    keras.Model,
    keras.Sequential,
    keras.layers.BatchNormalization,
    keras.optimizers.Adam,
    keras.optimizers.LossScaleOptimizer,
    keras.callbacks.Callback,
    keras.metrics.Mean,
    keras.Variable,
    keras.KerasTensor,
    tf.Module,
    tf.Variable,
    tf.Tensor,
    tf.Graph,
    tf.Operation,
)
PRIVATE = {name for base in BASES for name in dir(base) if name.startswith("_") and not name.startswith("__")}
FORBIDDEN_IMPORTS = ("keras.src", "tensorflow.python", "tensorflow.core", "tensorflow.compiler")


def private_names(tree):
    """The names in attributes, strings, keywords and definitions, with their lines."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=name) | ast.FunctionDef(name=name):
                yield name, getattr(node, "lineno", 0)
            case ast.Constant(value=str(name)):
                yield name, node.lineno


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_private_name(path):
    found = [(name, line) for name, line in private_names(ast.parse(path.read_text())) if name in PRIVATE]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_private_import(path):
    text = path.read_text()
    assert [name for name in (*FORBIDDEN_IMPORTS, "__internal__") if name in text] == []


def test_the_wall_sees_what_it_should():
    """The names through `self`, in strings, keywords and definitions are found."""
    tree = ast.parse(
        "class A(keras.Model):\n"
        "    def _maybe_symbolic_build(self):\n"
        "        self._loss_tracker, getattr(self, '_flatten_layers'), overriding(self, _clip_gradients=None)\n"
    )
    found = {name for name, _ in private_names(tree)}
    assert {"_maybe_symbolic_build", "_flatten_layers", "_clip_gradients"} <= found & PRIVATE
