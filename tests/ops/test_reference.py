"""Wrong arguments to reference functions that callers outside of the ops use as well."""

import pytest
import tensorflow as tf

from accumops import ops


def test_step_refuses_an_unknown_rule_by_its_name():
    one = tf.constant([1.0])
    with pytest.raises(ValueError, match=r"must be one of 'sgd', .*'lion'\. Received: 'adagrad'"):
        ops.reference.step("adagrad", one, [one, one], one, tf.constant(0.1), 0.9, 0.99, 1e-7)
