"""Settings for all tests, and the names that doctests find defined."""

import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(autouse=True)
def doctest_names(request: pytest.FixtureRequest) -> None:
    """Gives docstring examples `accumops`, `keras`, `np` and `tf`; imports none of them for the kernels' own tests."""
    if isinstance(request.node, pytest.DoctestItem):
        import keras
        import numpy as np
        import tensorflow as tf

        import accumops

        request.getfixturevalue("doctest_namespace").update(accumops=accumops, keras=keras, np=np, tf=tf)
