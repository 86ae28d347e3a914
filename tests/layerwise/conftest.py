"""A fixture for models that compute in float64."""

import pytest
from whole_batches import computing_in


@pytest.fixture
def float64():
    """Models that are made in the test compute in float64."""
    with computing_in("float64"):
        yield
