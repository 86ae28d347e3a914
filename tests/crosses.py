"""Crosses of independent arguments: the default run has some of the combinations, `-m exhaustive` the rest."""

import itertools

import pytest


def cross(*axes, default):
    """Every combination of the axes' values; those for which `default(*values)` is false are marked exhaustive."""
    return [
        pytest.param(*values, marks=() if default(*values) else pytest.mark.exhaustive)
        for values in itertools.product(*axes)
    ]


def turns(values, others):
    """Pairs each value with one of the others, which take turns."""
    return list(zip(values, itertools.cycle(others), strict=False))


def label(value):
    """A value's part of a test's name."""
    return str(getattr(value, "name", value))
