"""What micro-batches and windows tell of the gradient's noise: the ops, their references, and the raw ops."""

import numpy as np
import pytest
import tensorflow as tf
from handles import table, uninitialized, variable

from accumops import ops
from accumops.ops import library

INVALID = tf.errors.InvalidArgumentError
PRECONDITION = tf.errors.FailedPreconditionError


def new_window(value=(0, 0, 0, 0)):
    return tf.Variable(value, dtype=tf.float64)


def new_statistics(averages=(0, 0, 0)):
    return ops.NoiseStatistics(
        tf.Variable(averages, dtype=tf.float64), tf.Variable(0.0, dtype=tf.float64), tf.Variable([0, 0], dtype=tf.int64)
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16])
def test_a_window_of_gradients(backend, mode, rng, dtype):
    """Against the formulas, from the gradients themselves: ragged micro-batches, one without a share."""
    gradients = rng.standard_normal((4, 2, 5)).astype(np.float32) + 1
    shares = [2.0, 0.0, 0.5, 1.5]
    accumulators = [tf.Variable(tf.zeros([5], tf.float64)) for _ in range(2)]
    window, statistics = new_window([np.nan, np.nan, np.nan, 3]), new_statistics([1, 2, 1])

    @mode
    def add(first, second, share, starts):
        norms = ops.accumulate(
            accumulators, [first, second], scale=tf.cast(share, tf.float32), overwrite=starts, squared_norms=True
        )
        ops.add_noise_group(window, norms, share=share, starts=starts)

    @mode
    def end(value, total, steps, applies):
        ops.end_noise_window(value, statistics, shares=total, steps=steps, decay=0.25, applies=applies)

    for i, share in enumerate(shares):
        add(*map(tf.constant, gradients[i]), tf.constant(share, dtype), tf.constant(i == 0))
    total = tf.constant(sum(shares), dtype)
    end(window, total, tf.constant(4, tf.int64), tf.constant(True))

    weights, wide = np.array(shares), gradients.astype(np.float64).reshape(4, -1)
    mean = (weights[:, None] * wide).sum(0) / 4
    squares = (weights * (wide**2).sum(1)).sum()
    np.testing.assert_allclose(window.numpy(), [squares, 3, 16 * (mean**2).sum(), 7], rtol=2e-6)
    trace = (squares - 4 * (mean**2).sum()) / 2
    square = (mean**2).sum() - trace / 4
    wanted = 0.25 * np.array([1, 2, 1]) + 0.75 * np.array([trace, square, 1])
    np.testing.assert_allclose(statistics.averages.numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(statistics.norm.numpy(), np.linalg.norm(mean), rtol=2e-6)
    assert statistics.ended.numpy().tolist() == [1, 4]

    end(window, total, tf.constant(3, tf.int64), tf.constant(False))
    np.testing.assert_allclose(statistics.averages.numpy(), wanted, rtol=1e-5)
    assert np.isnan(statistics.norm.numpy())
    assert statistics.ended.numpy().tolist() == [2, 7]


@pytest.mark.parametrize(
    ("window", "norm"),
    [
        ([8, 1, 8, 2], 2**0.5),  # one micro-batch tells nothing of the noise
        ([np.inf, 2, 8, 2], 2**0.5),
        ([8, 2, np.nan, 2], np.nan),
        ([np.nan, 2, np.inf, 2], np.nan),
    ],
)
def test_windows_that_tell_nothing(backend, mode, window, norm):
    statistics = new_statistics([1, 2, 3])
    run = mode(lambda value: ops.end_noise_window(value, statistics, shares=2.0, steps=2, decay=0.5))
    run(tf.constant(window, tf.float64))
    assert statistics.averages.numpy().tolist() == [1, 2, 3]
    np.testing.assert_allclose(statistics.norm.numpy(), norm)
    assert statistics.ended.numpy().tolist() == [1, 2]


def test_a_scaled_loss(backend, mode):
    statistics, scaled = new_statistics(), new_statistics()

    @mode
    def end(value, scale):
        given = {"shares": 2.0, "steps": 2, "decay": 0.5}
        ops.end_noise_window(value, statistics, **given)
        ops.end_noise_window(value * [64, 1, 64, 1], scaled, scale=scale, **given)

    end(tf.constant([9, 2, 8, 2], tf.float64), tf.constant(8.0))
    np.testing.assert_array_equal(statistics.averages.numpy(), scaled.averages.numpy())
    assert statistics.averages.numpy()[0] > 0


NORMS = tf.zeros([2, 3], tf.float64)
WINDOW = tf.zeros([4], tf.float64)
STATISTICS = new_statistics()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "`window` must be a tf.Variable", lambda: ops.add_noise_group([0.0] * 4, NORMS, share=1.0)),
        (
            ValueError,
            r"`window` must be float64 of shape \(4,\). Received: float32",
            lambda: ops.add_noise_group(tf.Variable([0.0] * 4), NORMS, share=1.0),
        ),
        (
            ValueError,
            r"`norms` must be float64 of shape \(2, None\). Received: float64 of shape \(3,\)",
            lambda: ops.add_noise_group(new_window(), NORMS[0], share=1.0),
        ),
        (
            ValueError,
            "`share` must be a number or a floating-point scalar tensor",
            lambda: ops.add_noise_group(new_window(), NORMS, share=tf.ones([2])),
        ),
        (
            ValueError,
            "`starts` must be a bool",
            lambda: ops.add_noise_group(new_window(), NORMS, share=1.0, starts=tf.constant(1)),
        ),
        (
            TypeError,
            "`statistics` must be a NoiseStatistics",
            lambda: ops.end_noise_window(WINDOW, tuple(STATISTICS), shares=1.0, steps=1, decay=0.5),
        ),
        (
            ValueError,
            r"`statistics.ended` must be int64 of shape \(2,\). Received: float64 of shape \(4,\)",
            lambda: ops.end_noise_window(
                WINDOW, STATISTICS._replace(ended=new_window()), shares=1.0, steps=1, decay=0.5
            ),
        ),
        (
            TypeError,
            "`statistics.norm` must be a tf.Variable",
            lambda: ops.end_noise_window(WINDOW, STATISTICS._replace(norm=0.0), shares=1.0, steps=1, decay=0.5),
        ),
        (
            ValueError,
            "`decay` must be at least 0 and less than 1",
            lambda: ops.end_noise_window(WINDOW, STATISTICS, shares=1.0, steps=1, decay=1.0),
        ),
        (
            ValueError,
            "`steps` must be an int or an integer scalar tensor",
            lambda: ops.end_noise_window(WINDOW, STATISTICS, shares=1.0, steps=1.5, decay=0.5),
        ),
        (
            ValueError,
            "`scale` must be a number or a floating-point scalar tensor",
            lambda: ops.end_noise_window(WINDOW, STATISTICS, shares=1.0, steps=1, decay=0.5, scale=tf.constant(2)),
        ),
    ],
)
def test_arguments_are_checked(backend, error, message, call):
    with pytest.raises(error, match=message):
        call()
    assert STATISTICS.ended.numpy().tolist() == [0, 0]


class Raw:
    """The raw ops, in calls that are right but for what is changed."""

    def __init__(self):
        self.module, _ = library.load()
        if self.module is None:
            pytest.skip("the compiled ops do not load")
        self.window, self.other, self.statistics = new_window(), new_window(), new_statistics()

    def add(self, **changes):
        given = {"window": [self.window.handle], "norms": NORMS, "share": tf.ones([]), "starts": tf.constant(True)}
        self.module.accum_ops_add_noise_group(**given | changes)

    def end(self, **changes):
        given = {
            "statistics": self.handles,
            "window": WINDOW,
            "shares": tf.ones([]),
            "scale": tf.ones([], tf.float64),
            "applies": tf.constant(True),
            "steps": tf.constant(1, tf.int64),
            "decay": tf.constant(0.5, tf.float64),
        }
        self.module.accum_ops_end_noise_window(**given | changes)

    @property
    def handles(self):
        return [each.handle for each in self.statistics]


DAMAGE = {
    "no window": (r"window must be one variable, not 0", lambda a: a.add(window=[])),
    "two windows": (r"window must be one variable, not 2", lambda a: a.add(window=[a.window.handle, a.other.handle])),
    "a short window": (
        r"is double of shape \[2\]; it must be double of shape \[4\]",
        lambda a: a.add(window=[variable([1.0, 2.0], tf.float64)]),
    ),
    "a window of float32": (
        r"is float of shape \[4\]; it must be double of shape \[4\]",
        lambda a: a.add(window=[variable([1.0] * 4, tf.float32)]),
    ),
    "a table for a window": ("resource|uninitialized", lambda a: a.add(window=[table()])),
    "an uninitialized window": (r"uninitialized", lambda a: a.add(window=[uninitialized(tf.float64, [4])])),
    "norms of one row": (
        r"norms has shape \[1,3\]; it must be \[2, number of gradients\]",
        lambda a: a.add(norms=NORMS[:1]),
    ),
    "norms of three rows": (
        r"norms has shape \[3,2\]; it must be \[2, number of gradients\]",
        lambda a: a.add(norms=tf.zeros([3, 2], tf.float64)),
    ),
    "two shares": (r"scalar|rank 0", lambda a: a.add(share=tf.ones([2]))),
    "two flags": (r"scalar|rank 0", lambda a: a.add(starts=tf.constant([True, False]))),
    "two statistics": (r"statistics must be three variables, not 2", lambda a: a.end(statistics=a.handles[:2])),
    "a statistic twice": (
        r"are the same variable; give it once",
        lambda a: a.end(statistics=[a.handles[0], a.handles[1], a.handles[1]]),
    ),
    "statistics in another order": (r"it must be double of shape \[3\]", lambda a: a.end(statistics=a.handles[::-1])),
    "a window of five": (
        r"window has shape \[5\]; it must be \[4\]",
        lambda a: a.end(window=tf.zeros([5], tf.float64)),
    ),
    "two totals": (r"scalar|rank 0", lambda a: a.end(shares=tf.ones([2]))),
    "two scales": (r"scalar|rank 0", lambda a: a.end(scale=tf.ones([2], tf.float64))),
    "two numbers of steps": (r"scalar|rank 0", lambda a: a.end(steps=tf.constant([1, 2], tf.int64))),
    "two decays": (r"scalar|rank 0", lambda a: a.end(decay=tf.constant([0.5, 0.5], tf.float64))),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_the_raw_ops_check_their_inputs(mode, message, damage):
    raw = Raw()
    with pytest.raises((INVALID, PRECONDITION, ValueError, TypeError), match=message):
        mode(lambda: damage(raw))()
    assert raw.window.numpy().tolist() == [0, 0, 0, 0]
    assert [each.numpy().tolist() for each in raw.statistics] == [[0, 0, 0], 0, [0, 0]]
    raw.add()  # no lock was left behind
    raw.end()
    assert raw.statistics.ended.numpy().tolist() == [1, 1]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("op", "name", "wrong", "message"),
    [
        ("add", "norms", tf.zeros([3, 2], tf.float64), "norms has shape"),
        ("add", "share", tf.ones([2]), "share must be a scalar"),
        ("end", "window", tf.zeros([5], tf.float64), "window has shape"),
        ("end", "decay", tf.ones([2], tf.float64), "decay must be a scalar"),
    ],
)
def test_shapes_that_only_the_call_shows(op, name, wrong, message, jit_compile):
    raw = Raw()
    signature = [tf.TensorSpec(None, wrong.dtype)]
    run = tf.function(
        lambda given: getattr(raw, op)(**{name: given}), input_signature=signature, jit_compile=jit_compile
    )
    with pytest.raises(INVALID, match=message):
        run(wrong)
    assert raw.window.numpy().tolist() == [0, 0, 0, 0]
    assert raw.statistics.ended.numpy().tolist() == [0, 0]
