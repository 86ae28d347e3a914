"""Malformed calls of the raw ops of TensorFlow, eagerly, in graphs and under XLA: each raises an error, and no variable
changes.

No wrapper of accumops checks these arguments: what reaches the ops here is what any program can give them.

    python tests/harden/malformed_ops.py --seconds 60
    python tests/harden/malformed_ops.py --call MODE SEED NUMBER     makes one call, to look into it
"""

import os
import random
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from supervised import Found, main, repeat

from accumops.ops import library

# Errors that say what is wrong with a call. Not tf.errors.InternalError or UnknownError, which say that nobody checked.
REFUSALS = (
    tf.errors.InvalidArgumentError,
    tf.errors.FailedPreconditionError,
    tf.errors.NotFoundError,
    tf.errors.UnimplementedError,
    TypeError,
    ValueError,
    OverflowError,
    AssertionError,  # TensorFlow's own, for attributes of a wrong type in a graph
)
# The calls of a process, in which graphs and compiled functions pile up; and the part of the time.
MODES = {"eager": (100_000, 0.45), "graph": (5_000, 0.35), "xla": (500, 0.2)}


VALUES = {
    "a": np.ones((2, 3), np.float32),
    "b": np.ones((2, 3), np.float32),
    "b2": np.ones((2, 3), np.float32),
    "c": np.ones(4, np.float32),
    "table": np.ones((5, 3), np.float32),
    "scalar": np.float32(1),
    "empty": np.ones((0, 3), np.float32),
    "wide": np.ones((2, 3), np.float64),
    "half": np.ones((2, 3), np.float16),
    "integers": np.ones(3, np.int64),
    "counters": np.array([0, 0, 3], np.int64),
    "sums": np.zeros((2, 3), np.float64),
    "noise_window": np.zeros(4),
    "noise_averages": np.zeros(3),
    "noise_norm": np.zeros(()),
    "noise_ended": np.zeros(2, np.int64),
    "mean": np.zeros(3, np.float32),
    "variance": np.ones(3, np.float32),
    "flags": np.array([True, False]),
    "flags of table": np.ones(5, np.bool_),
}


def bits(array):
    return array.shape, array.tobytes()


def read(variable):
    """The bits of a variable, by the quickest way: after each call all variables are read."""
    return bits(tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype).numpy())


BITS = {name: bits(value) for name, value in VALUES.items()}


class State:
    """The variables that calls are given, right and wrong ones."""

    def __init__(self):
        self.variables = {name: tf.Variable(value) for name, value in VALUES.items()}
        self.handles = {name: variable.handle for name, variable in self.variables.items()}
        for name, dtype in (("gone", tf.float32), ("gone flags", tf.bool)):
            self.handles[name] = tf.raw_ops.VarHandleOp(dtype=dtype, shape=[2, 3], shared_name=name)
        self.handles["hash table"] = tf.raw_ops.HashTableV2(
            key_dtype=tf.int64, value_dtype=tf.int64, shared_name="hash table"
        )
        self.handles["two"] = tf.stack([self.handles["a"], self.handles["b"]])
        self.handles["list of one"], self.handles["list of none"] = self.handles["two"][:1], self.handles["two"][:0]

    def changed(self):
        """The names of variables that have another value, which get their own back."""
        names = [name for name, variable in self.variables.items() if read(variable) != BITS[name]]
        for name in names:
            self.variables[name].assign(VALUES[name])
        return names


class Handle(str):
    """The name of a variable in a call."""


def ones(*shape, dtype=tf.float32):
    return tf.ones(shape, dtype)


# For each op calls that are right.
CALLS = {
    "accumulate": (
        {
            "accumulators": [Handle("a"), Handle("c")],
            "gradients": [ones(2, 3), ones(4, dtype=tf.float16)],
            "indices": [],
            "touched_rows": [],
            "scale": tf.constant(0.5),
            "overwrite": tf.constant(False),
            "norms_if": [],
            "only_if": [],
            "check_finite": [tf.bool],
            "squared_norms": [tf.float64],
        },
        {
            "accumulators": [Handle("c"), Handle("a"), Handle("table")],
            "gradients": [ones(4), ones(3, 3), ones(2, 3)],
            "indices": [tf.constant([0, 1, 1]), tf.constant([4, 0], tf.int64)],
            "touched_rows": [Handle("flags of table")],
            "scale": tf.constant(2.0),
            "overwrite": tf.constant(True),
            "norms_if": [tf.constant(True)],
            "only_if": [tf.constant(True)],
            "check_finite": [],
            "squared_norms": [tf.float64],
        },
    ),
    "update": (
        {
            "variables": [Handle("a")],
            "slots": [Handle("b")],
            "accumulators": [],
            "touched_rows": [Handle("flags")],
            "latest": [ones(2, 3)],
            "scales": tf.constant(1.0),
            "rate": tf.constant(0.1),
            "iterations": [],
            "decay": tf.constant(0.0),
            "weight": tf.constant(1.0),
            "overwrite": tf.constant(False),
            "applies": tf.constant(True),
            "only_if": [],
            "rule": "momentum",
            "rows_of": [0],
            "decays": [True],
            "beta_1": 0.9,
        },
        {
            "variables": [Handle("a"), Handle("c")],
            "slots": [],
            "accumulators": [],
            "touched_rows": [],
            "latest": [ones(2, 3), ones(4, dtype=tf.bfloat16)],
            "scales": ones(2),
            "rate": tf.constant(0.1),
            "iterations": [],
            "decay": tf.constant(0.0),
            "weight": tf.constant(1.0),
            "overwrite": tf.constant(False),
            "applies": tf.constant(True),
            "only_if": [tf.constant(True)],
            "rule": "sgd",
            "rows_of": [],
            "decays": [True, False],
            "clip": 0.5,
        },
        {
            "variables": [Handle("a")],
            "slots": [Handle("b"), Handle("b2")],
            "accumulators": [],
            "touched_rows": [],
            "latest": [ones(2, 3)],
            "scales": tf.constant(1.0),
            "rate": tf.constant(0.1),
            "iterations": [tf.constant(3, tf.int64)],
            "decay": tf.constant(0.0),
            "weight": tf.constant(1.0),
            "overwrite": tf.constant(False),
            "applies": tf.constant(True),
            "only_if": [],
            "rule": "adam",
            "rows_of": [],
            "decays": [True],
            "beta_1": 0.9,
            "beta_2": 0.99,
        },
    ),
    "squared_norms": ({"values": [ones(2, 3), ones(4, dtype=tf.float64)]},),
    "clip_units": (
        {
            "gradients": [ones(2, 3), ones(4)],
            "weights": [ones(2, 3), ones(4)],
            "clip_factor": 0.1,
            "epsilon": 1e-3,
        },
    ),
    "barrier": ({"tensors": [ones(2, 3)], "after": [ones(4)]},),
    "batch_norm": (
        {
            "x": ones(4, 2, 3),
            "gamma": ones(3),
            "beta": ones(3),
            "mask": [ones(4, 2, dtype=tf.bool)],
            "axis": 2,
            "epsilon": 1e-3,
        },
        {"x": ones(4, 2, 3), "gamma": ones(2), "beta": ones(2), "mask": [], "axis": 1, "epsilon": 1e-3},
    ),
    "batch_norm_grad": (
        {
            "dy": ones(4, 2, 3),
            "x": ones(4, 2, 3),
            **{name: ones(3) for name in ("gamma", "mean", "rest", "inverse")},
            "count": tf.constant(8, tf.int64),
            "mask": [],
            "axis": 2,
        },
    ),
    "batch_norm_inference": (
        {
            "x": ones(4, 2, 3),
            **{name: ones(3) for name in ("gamma", "beta", "mean", "variance")},
            "axis": 2,
            "epsilon": 1e-3,
        },
    ),
    "merge_moments": (
        {
            "window": [Handle("counters"), Handle("sums")],
            "moving": [Handle("mean"), Handle("variance")],
            "count": [tf.constant(5, tf.int64)],
            "moments": [ones(3), ones(3), ones(3)],
            "momentum": tf.constant(0.9, tf.float64),
        },
        {
            "window": [],
            "moving": [Handle("mean"), Handle("variance")],
            "count": [tf.constant(5, tf.int64)],
            "moments": [ones(3), ones(3), ones(3)],
            "momentum": tf.constant(0.9, tf.float64),
        },
    ),
    "add_to_windows": (
        {
            "windows": [Handle("counters"), Handle("sums")],
            "counts": [tf.constant(5, tf.int64)],
            "moments": [ones(3), ones(3), ones(3)],
            "applies": tf.constant(True),
        },
    ),
    "add_noise_group": (
        {
            "window": [Handle("noise_window")],
            "norms": tf.ones([2, 3], tf.float64),
            "share": tf.constant(1.0),
            "starts": tf.constant(True),
        },
    ),
    "end_noise_window": (
        {
            "statistics": [Handle("noise_averages"), Handle("noise_norm"), Handle("noise_ended")],
            "window": tf.ones([4], tf.float64),
            "shares": tf.constant(1.0),
            "scale": tf.constant(1.0, tf.float64),
            "applies": tf.constant(True),
            "steps": tf.constant(3, tf.int64),
            "decay": tf.constant(0.9, tf.float64),
        },
    ),
    "end_windows": (
        {
            "windows": [Handle("counters"), Handle("sums")],
            "moving": [Handle("mean"), Handle("variance")],
            "momenta": tf.constant([0.9], tf.float64),
            "applies": tf.constant(True),
        },
    ),
}
YES = tf.constant(True)
SHAPES = ((), (0,), (1,), (2,), (3,), (4,), (2, 3), (3, 2), (0, 3), (4, 2, 3), (2, 3, 1), (5, 3))
DTYPES = (tf.float32, tf.float16, tf.bfloat16, tf.float64, tf.int32, tf.int64, tf.bool, tf.complex64, tf.uint8)
TENSORS = [tf.ones(shape, dtype) for shape in SHAPES for dtype in DTYPES]
TENSORS += [tf.constant(each) for each in ("text", [-1, 0], [0, 99], [float("nan")] * 3, float("inf"), -7)]
TENSORS += [tf.constant([1 << 40, 0], tf.int64), tf.constant([[0, 1]])]
ATTRIBUTES = (
    *(0, 1, 2, -1, 7, 1 << 31, 1 << 40, -(1 << 40), 0.5, -1.0, float("nan"), float("inf"), True, None, "sgd", "adam"),
    *("amsgrad", "lion", "x", [], [0], [1], [0, 0], [1, 0], [-1], [7], [True], [False] * 3, tf.float32, object()),
)


def damaged(random_, state, call):
    """A call with one to three changes, its handles by name still."""
    call = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    for _ in range(random_.choice((1, 1, 2, 3))):
        name = random_.choice(tuple(call))
        value = call[name]
        holder, key = call, name
        if isinstance(value, list) and value and random_.random() < 0.6:
            holder, key = value, random_.randrange(len(value))
            value = holder[key]
        if isinstance(value, list) and random_.random() < 0.7:
            change = random_.randrange(4)
            if change == 0 and value:
                value.pop(random_.randrange(len(value)))
            elif change == 1 and value:
                value.append(random_.choice(value))
            elif change == 2:
                value.append(something(random_, state))
            else:
                random_.shuffle(value)
        elif isinstance(value, Handle):
            holder[key] = Handle(random_.choice(tuple(state.handles))) if random_.random() < 0.9 else TENSORS[0]
        elif tf.is_tensor(value):
            holder[key] = like(random_, value) if random_.random() < 0.6 else something(random_, state)
        else:
            holder[key] = attribute(random_)
    return call


def like(random_, tensor):
    """A tensor of another dtype or another shape."""
    if random_.random() < 0.3:
        return tf.ones(tensor.shape, random_.choice(DTYPES))
    make = tf.zeros if tensor.dtype == tf.string else tf.ones
    return make(random_.choice(SHAPES), tensor.dtype)


def something(random_, state):
    kind = random_.randrange(4)
    if kind == 0:
        return Handle(random_.choice(tuple(state.handles)))
    return attribute(random_) if kind == 1 else random_.choice(TENSORS)


def attribute(random_):
    value = random_.choice(ATTRIBUTES)
    return list(value) if isinstance(value, list) else value


def run(state, op, call, mode, unknown="none"):
    """Runs a call.

    Args:
        unknown: What is not known when a function is traced: "none", "all" variables and shapes, or the length of the
            tensor at this position, which XLA learns when it runs.
    """
    flat = [each for value in call.values() for each in (value if isinstance(value, list) else [value])]
    tensors = [each for each in flat if tf.is_tensor(each)]
    names = []
    if unknown == "all":
        # One argument for each variable, so that kernels and lowerings see one that is given twice: TensorFlow itself
        # refuses two arguments that are the same under XLA. Not for "two": if TensorFlow does not know how many handles
        # a tensor holds, it gives what XLA compiles the first one. Its own ops take that as well.
        names = list(dict.fromkeys(each for each in flat if isinstance(each, Handle) and each != "two"))

    def apply(yes, *given):
        handles = state.handles | dict(zip(names, given, strict=False))
        given = list(given[len(names) :])
        if unknown in range(len(given)) and given[unknown].shape.rank:
            rows = tf.where(tf.fill(tf.shape(given[unknown])[:1], yes))[:, 0]
            given[unknown] = tf.gather(given[unknown], rows)
        given = iter(given)

        def real(value):
            if isinstance(value, Handle):
                return handles[value]
            return next(given) if tf.is_tensor(value) else value

        arguments = {
            name: [real(each) for each in value] if isinstance(value, list) else real(value)
            for name, value in call.items()
        }
        result = getattr(library.load()[0], f"accum_ops_{op}")(**arguments)
        return None if isinstance(result, tf.Operation) else result

    arguments = [YES, *(state.handles[name] for name in names), *tensors]
    if mode == "eager":
        return apply(*arguments)
    signature = [tf.TensorSpec(None if unknown == "all" else each.shape, each.dtype) for each in arguments]
    function = tf.function(apply, input_signature=signature, autograph=False, jit_compile=mode == "xla")
    return function(*arguments)


def described(error):
    return f"{type(error).__name__}: {error}"


def make_call(state, mode, seed, number):
    """Makes a call. Returns the error, or None if it was right all the same."""
    random_ = random.Random(seed << 40 | number)
    op = random_.choice(tuple(CALLS))
    call = damaged(random_, state, random_.choice(CALLS[op]))
    unknown = random_.choice(("none", "all", random_.randrange(8)))
    where = f"{op} ({mode}, unknown: {unknown})"
    try:
        run(state, op, call, mode, unknown)
    except REFUSALS as error:
        changed = state.changed()
        if changed:
            raise Found(f"{where} changed {changed} before it raised {described(error)}: {call}") from error
        if not str(error):
            raise Found(f"{where} raised {described(error)}, which says nothing: {call}") from error
        return error
    except Exception as error:
        raise Found(f"{where} raised {described(error)}: {call}") from error
    state.changed()
    if mode != "eager":
        try:
            run(state, op, call, "eager")
        except REFUSALS as error:
            # Of what is no tensor TensorFlow makes one before a kernel sees it, eagerly in another way than in graphs.
            by_kernel = isinstance(error, tf.errors.OpError)
            # Rows that are not there are skipped under XLA, as TensorFlow's own scatters do.
            skipped = mode == "xla" and "is not a row of" in str(error)
            if by_kernel and not skipped:
                raise Found(f"{where} takes what it refuses eagerly, with {described(error)}: {call}") from error
        state.changed()
    return None


def work(seed, deadline, progress, mode):
    module, problem = library.load()
    if module is None:
        raise Found(f"there are no compiled ops: {problem}")
    tf.config.set_visible_devices([], "GPU")
    state = State()
    for op, calls in CALLS.items():
        for call in calls:
            run(state, op, call, mode)  # what is damaged is right
    state.changed()
    refused = 0
    for number in range(MODES[mode][0]):
        progress.value = number
        refused += make_call(state, mode, seed, number) is not None
        if time.time() > deadline:
            break
    return {f"{mode} calls": number + 1, f"malformed {mode} calls": refused}


def part(seconds):
    counts = {}
    for mode, (_, share) in MODES.items():
        counts |= repeat(work, seconds * share, preload=["tensorflow"], mode=mode)
    counts["malformed calls"] = sum(counts[f"malformed {mode} calls"] for mode in MODES)
    del counts["processes"]
    return counts


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        found = make_call(State(), sys.argv[2], *map(int, sys.argv[3:5]))
        print(found and described(found))
    else:
        main(part)
