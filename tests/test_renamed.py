"""Names and arguments of other libraries: an error that says what to write here."""

import inspect
import re
from pathlib import Path

import keras
import pytest

import accumops
from accumops.renamed import ARGUMENTS, NAMES

_ROWS = [(called, name) for called, names in ARGUMENTS.items() for name in names]
_COMING_FROM = Path(__file__).parents[1] / "docs" / "coming_from.md"


def resolve(path):
    value = accumops
    for part in path.split(".")[1:]:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("old", NAMES)
def test_names(old):
    module, _, name = old.rpartition(".")
    text = rf"module '{module}' has no attribute '{name}'\. Use {re.escape(NAMES[old])}\."
    with pytest.raises(AttributeError, match=text):
        getattr(resolve(module), name)
    assert not hasattr(resolve(module), name)
    with pytest.raises(ImportError, match=text):
        exec(f"from {module} import {name}")


@pytest.mark.parametrize("old", NAMES)
def test_what_stands_in_for_a_name_is_there(old):
    instead = re.findall(r"accumops(?:\.\w+)+", NAMES[old])
    assert instead
    for path in instead:
        assert callable(resolve(path))


def test_a_name_that_nobody_has():
    with pytest.raises(AttributeError, match=r"^module 'accumops\.layers' has no attribute 'nonsense'$"):
        _ = accumops.layers.nonsense


@pytest.mark.parametrize(("called", "name"), _ROWS)
def test_arguments(called, name):
    with pytest.raises(TypeError) as error:
        getattr(accumops, called)(**{name: 4})
    assert str(error.value) == f"{called} takes no `{name}`: {ARGUMENTS[called][name]}."


@pytest.mark.parametrize(("called", "name"), _ROWS)
def test_what_stands_in_for_an_argument_is_there(called, name):
    parameters = inspect.signature(getattr(accumops, called)).parameters
    assert name not in parameters
    for instead in re.findall(r"(?:write|here) `(\w+)=", ARGUMENTS[called][name]):
        assert instead in parameters
    for path in re.findall(r"accumops(?:\.\w+)+", ARGUMENTS[called][name]):
        assert callable(resolve(path))


def test_several_arguments_are_named_together():
    text = (
        "GradientAccumulateModel takes no `mixed_precision`: .* mixed_float16. "
        "GradientAccumulateModel takes no `use_agc`, `eps`: write `gradient_clipping="
    )
    with pytest.raises(TypeError, match=text):
        accumops.GradientAccumulateModel(accum_steps=4, mixed_precision=True, use_agc=True, eps=1e-3)


def test_other_unknown_arguments_are_python_s():
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'nonsense'"):
        accumops.GradientAccumulator(4, nonsense=1)
    with pytest.raises(ValueError, match="Unrecognized keyword arguments passed to AccumBatchNormalization"):
        accumops.AccumBatchNormalization(nonsense=1)


def test_the_number_of_micro_batches_in_place_of_the_model():
    inputs = keras.Input((3,))
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model\. Received: 4\. Write `accum_steps=4`\."):
        accumops.GradientAccumulateModel(4, inputs=inputs, outputs=keras.layers.Dense(1)(inputs))


@pytest.mark.parametrize("reduction", ["MEAN", "SUM"])
@pytest.mark.parametrize("make", [accumops.GradientAccumulator, lambda k, **kw: wrapped(k, **kw)])
def test_reductions_in_capitals(make, reduction):
    with pytest.raises(ValueError, match=f"`reduction` must be 'mean' or 'sum'. Received: '{reduction}'"):
        make(4, reduction=reduction)


def wrapped(accum_steps, **arguments):
    return accumops.GradientAccumulateOptimizer("sgd", accum_steps, **arguments)


@pytest.mark.parametrize("called", ARGUMENTS)
def test_signatures_are_what_they_were(called):
    """Keras reads them by `inspect.getfullargspec`, which does not look behind a decorator."""
    value = getattr(accumops, called)
    function = value.__init__ if inspect.isclass(value) else value
    behind = inspect.getfullargspec(inspect.unwrap(function))
    assert inspect.getfullargspec(function) == behind
    assert behind.varargs is None or called == "AccumBatchNormalization"
    assert function.__doc__ == inspect.unwrap(function).__doc__


def test_the_document_has_all_of_them():
    text = _COMING_FROM.read_text()
    names = {old.rpartition(".")[2] for old in NAMES} | {name for _, name in _ROWS}
    assert [name for name in sorted(names) if re.search(rf"\b{name}\b", text) is None] == []
