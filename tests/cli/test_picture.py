"""The numbers beside the bars of `accumops bench --plot`."""

import pytest

from accumops.benchmark import Result, Row
from accumops.cli import picture


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.04321, "0.0432 ms"), (999.4, "999 ms"), (4978.75, "4,979 ms"), (12345.6, "12,346 ms")]
)
def test_bars_have_no_exponents(milliseconds, text):
    row = Row("case", "name", milliseconds)
    assert picture._label(Result("", (row,)), row, 1.0, "ms") == text
