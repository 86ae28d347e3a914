"""Replicas reduce as many bytes in a window as the formula in docs/scaling.md says."""

import sys
from pathlib import Path

import pytest
from replicas import mirrored

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import collectives
import scaling

pytestmark = pytest.mark.usefixtures("logical_devices")


ACCUMULATING = [
    each for each in collectives.CASES if each.training != "Keras" and each.dtype == "float32" and not each.synchronized
]
CASES = [(2, case) for case in collectives.CASES] + [(4, case) for case in ACCUMULATING]


def marks(replicas, case):
    """By default four replicas reduce in the plainest and the fullest window."""
    default = replicas == 2 or case.normalized == (case.training == "micro_batch_size")
    return () if default else pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("replicas", "case"),
    [
        pytest.param(replicas, case, id=f"{replicas}, {case.name}", marks=marks(replicas, case))
        for replicas, case in CASES
    ],
)
@pytest.mark.some_by_default(4)
def test_bytes_of_a_window(replicas, case):
    found, wanted = collectives.traced(case, mirrored(replicas)), collectives.predicted(case, replicas)
    assert list(found) == list(wanted)
    for name in wanted:
        assert collectives.same(found[name], wanted[name]), name


def test_what_the_formula_is():
    """P values and L layers of C channels together: 4 (P + 1) + 8 (2 C + L) bytes."""
    assert scaling.total_bytes(scaling.at_the_end(1000, (64, 48))) == 4 * 1001 + 8 * (2 * 112 + 2)
    assert scaling.total_bytes(scaling.of_a_micro_batch((64, 48))) == 8 * (2 * 112 + 2)


def test_the_page():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert "\n".join(scaling.window_times()) in page
    assert "\n".join(scaling.fewest_accum_steps()) in page


def test_one_replica_does_not_communicate():
    case = next(case for case in ACCUMULATING if case.normalized)
    assert not any(collectives.traced(case, mirrored(1)).values())


def test_what_is_executed():
    case = next(case for case in ACCUMULATING if case.normalized)
    assert collectives.executed(case, mirrored(2)) == 3
