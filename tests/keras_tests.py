"""Keras's own tests, run over objects of accumops in the place of Keras's.

A test module of Keras names classes that it makes optimizers and models of. While one of its tests runs, these names
stand for something that makes the same object, and wraps it.
"""

import fnmatch
import functools
import importlib
import importlib.util
import inspect
import sys
import types
from unittest import mock

import pytest

from accumops import GradientAccumulateModel, GradientAccumulateOptimizer

UNUSED = "the test uses none of the objects that are wrapped"


class _Marks:
    """`pytest.mark` without the markers of Keras that this project does not define."""

    skipif = pytest.mark.skipif

    def __getattr__(self, name):
        return lambda test: test


def keras_tests(path):
    """A test module of the installed Keras.

    Args:
        path: Its path in `keras.src`, with dots.

    Returns:
        The module, or None if the installed Keras ships no tests.
    """
    if importlib.util.find_spec(f"keras.src.{path}") is None:
        return None
    # Keras's tests import jax, of which those for TensorFlow use nothing, and skip conditions of its own conftest.
    stand_ins = {"conftest": types.SimpleNamespace(skip_if_backend=lambda *_: lambda test: test)}
    if importlib.util.find_spec("jax") is None:
        stand_ins["jax"] = types.ModuleType("jax")
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        with mock.patch.object(pytest, "mark", _Marks()):
            return importlib.import_module(f"keras.src.{path}")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class StandIn:
    """Stands for a class of Keras: what is made of it is wrapped, and counts as its instance.

    Args:
        kind: The class.
        wrap: Wraps an object of the class.
        used: A list that gets the class each time.
    """

    def __init__(self, kind, wrap, used):
        self._kind, self._wrap, self._used = kind, wrap, used
        self._making = False

    def __call__(self, *args, **kwargs):
        self._used.append(self._kind)
        return self._wrap(self._kind(*(inner(each) for each in args), **kwargs))

    def from_config(self, config):
        return self._wrap(self._kind.from_config(config))

    def __getattr__(self, name):
        return getattr(self._kind, name)

    def __instancecheck__(self, instance):
        return isinstance(inner(instance), self._kind)

    def __mro_entries__(self, bases):
        """A class of the test that inherits from the class: what is made of it is wrapped as well."""
        stand_in = self

        class Base(self._kind):
            def __new__(cls, *args, **kwargs):
                if stand_in._making:
                    return super().__new__(cls, *args, **kwargs)
                stand_in._making = True
                try:
                    return StandIn(cls, stand_in._wrap, stand_in._used)(*args, **kwargs)
                finally:
                    stand_in._making = False

        return (Base,)


def inner(value):
    """What is wrapped in a value: optimizers of optimizers get plain ones."""
    if isinstance(value, GradientAccumulateOptimizer):
        return value.inner_optimizer
    return value.model if isinstance(value, GradientAccumulateModel) else value


class _Module:
    """A module of Keras whose classes are replaced."""

    def __init__(self, module, replace):
        self._module, self._replace = module, replace

    def __getattr__(self, name):
        return replaced(getattr(self._module, name), self._replace)


def replaced(value, replace):
    """A value of a test module, replaced if it is a class, function or module that is to be."""
    if inspect.ismodule(value):
        return _Module(value, replace) if value.__name__.partition(".")[0] == "keras" else value
    return replace(value)


def substitute(module, replace, monkeypatch):
    """Replaces what a test module names, for one test.

    Args:
        module: The test module.
        replace: Returns what stands for a value, or the value.
        monkeypatch: pytest's.
    """
    for name, value in list(vars(module).items()):
        if not name.startswith("__") and (stands := replaced(value, replace)) is not value:
            monkeypatch.setattr(module, name, stands)


def over(module, test_case, stand_ins, exceptions, by_default=(), needs=None):
    """A test case whose tests are those of Keras, with objects of accumops in the place of its own.

    Args:
        module: The test module.
        test_case: Its test case.
        stand_ins: `stand_ins(used)` returns what `substitute` takes, with stand-ins that add to the list `used`.
        exceptions: Why tests do not apply, by patterns of their names.
        by_default: Patterns of the names of tests that run by default; the others are exhaustive.
        needs: A package that the tests need and do not ask for.
    """
    cases = {case["testcase_name"]: case for case in getattr(module, "TEST_CASES", ())}

    @pytest.fixture(autouse=True)
    def substituted(self, monkeypatch):
        self.used = []
        self.replace = stand_ins(self.used)
        substitute(module, self.replace, monkeypatch)

    def test(name):
        original = getattr(test_case, name)
        unbound = getattr(original, "__wrapped__", original)
        case = cases.get(name.removeprefix(unbound.__name__ + "_"))

        @functools.wraps(original)
        def run(self):
            if needs is not None:
                pytest.importorskip(needs)
            try:
                if case is None:
                    original(self)
                else:  # whose classes are known before they are replaced
                    arguments = {key: self.replace(value) for key, value in case.items() if key != "testcase_name"}
                    unbound(self, **arguments)
            except ImportError as error:
                self.skipTest(str(error))
            if not self.used:
                self.skipTest(UNUSED)

        run.pytestmark = list(getattr(original, "pytestmark", ()))
        for pattern, reason in exceptions.items():
            if fnmatch.fnmatchcase(name, pattern):
                run = pytest.mark.xfail(reason=reason, strict=True)(run)
        default = any(fnmatch.fnmatchcase(name, pattern) for pattern in by_default)
        return run if default else pytest.mark.exhaustive(run)

    tests = {name: test(name) for name in dir(test_case) if name.startswith("test")}
    return type(test_case.__name__, (test_case,), {"substituted": substituted, **tests})


def test_cases(module):
    """The test cases that a module defines, without those for another backend; none if there is no module."""
    if module is None:
        return []
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return [each for each in classes if hasattr(each, "assertAllClose") and not each.__name__.startswith("JAX")]


test_cases.__test__ = False
