"""Malformed calls of the kernels' module: each raises an error that says why, and writes to no memory.

All arrays lie in one block of memory. A call that fails must leave each of its bytes, and one that is right after all
must leave those outside of its arrays.

    python tests/harden/malformed_kernels.py --seconds 60
    python tests/harden/malformed_kernels.py --call SEED NUMBER     makes one call, to look into it
"""

import math
import random
import sys
import time

import numpy as np
from supervised import ROOT, Found, load_kernels, main, repeat

sys.path.append(str(ROOT / "tests" / "kernels"))
from malformed import cuda_like

REFUSALS = (TypeError, ValueError, IndexError, OverflowError, RuntimeError, BufferError, MemoryError)
CALLS_OF_A_PROCESS = 200_000


class Arena:
    """A block of memory that all arrays of a call lie in, apart from each other."""

    SIZE = 1 << 13

    def __init__(self):
        # Bytes that are right as bools.
        self._template = np.random.default_rng(0).integers(0, 2, self.SIZE, np.uint8)
        self.memory = self._template.copy()
        self.restart()

    def restart(self):
        self.memory[:] = self._template
        self._end = 64
        self.before = self._template

    def array(self, shape, dtype=np.float32, *, values=None, skip=0):
        dtype = np.dtype(dtype)
        shape = tuple(shape) if math.prod(shape) <= self.SIZE else (3,)
        begin = self._end + skip
        end = begin + math.prod(shape) * dtype.itemsize
        if end + 128 > self.SIZE or dtype.hasobject:
            return np.zeros(shape, dtype)
        self._end = end + 64 - end % 64 + 64
        array = np.ndarray(shape, dtype, self.memory, begin)
        if values is not None:
            array[...] = values
        return array

    def floats(self, *shape, dtype=np.float32):
        return self.array(shape, dtype, values=1)

    def freeze(self):
        """Remembers what is there: a call begins."""
        self.before = self.memory.copy()

    def changed_outside(self, arrays):
        """Whether a byte has changed that lies in none of the arrays."""
        changed = self.memory != self.before
        start = self.memory.__array_interface__["data"][0]
        for array in arrays:
            low, high = np.lib.array_utils.byte_bounds(array)
            low, high = max(low - start, 0), high - start
            if high > 0:
                changed[low:high] = False
        return bool(changed.any())


def channels(arena, names, count=3):
    return {name: arena.floats(count) for name in names}


# For each function the arguments of a call that is right.
CALLS = {
    "accumulate": lambda a: (
        [[a.floats(3), a.floats(2, 3)], [a.floats(3, dtype=np.float16), a.floats(2, 3)]],
        {
            "scale": 0.5,
            "overwrite": False,
            "all_finite": a.array((1,), bool),
            "squared_norms": a.array((2, 2), np.float64),
            "threads": None,
            "stream": 0,
        },
    ),
    "accumulate_rows": lambda a: (
        [a.floats(10, 3), a.floats(4, 3), a.array((4,), np.int64, values=[1, 2, 2, 9])],
        {"touched_rows": a.array((10,), bool), "scale": 1, "overwrite": True, "all_finite": None, "threads": 2},
    ),
    "update": lambda a: (
        ["adam", [a.floats(3), a.floats(4, 2)], [[a.floats(3), a.floats(4, 2)] for _ in range(2)]],
        {
            "accumulators": [a.floats(3), a.floats(4, 2)],
            "latest": [a.floats(3, dtype=np.float16), a.floats(4, 2)],
            "scales": a.floats(2),
            "rate": 0.1,
            "iterations": 3,
            "decay": 0.01,
            "decays": [True, False],
            "weight": 1.0,
            "overwrite": False,
            "applies": True,
            "touched_rows": [None, a.array((4,), bool)],
            "beta_1": 0.9,
            "beta_2": 0.99,
            "epsilon": 1e-7,
            "clip": 0.0,
            "threads": None,
        },
    ),
    "squared_norms": lambda a: (
        [[a.floats(3), a.floats(4, 2, dtype=np.float16)], a.array((2,), np.float64)],
        {"workspace": None, "threads": 1},
    ),
    "squared_norms_workspace": lambda a: ([[a.floats(3), a.floats(2)]], {}),
    "batch_norm": lambda a: (
        [a.floats(6, 3), a.floats(3), a.floats(3)],
        {
            "y": a.floats(6, 3),
            "count": a.array((1,), np.int64),
            **channels(a, ("mean", "rest", "variance", "inverse")),
            "axis": -1,
            "epsilon": 1e-3,
            "mask": a.array((6,), bool),
            "workspace": None,
            "threads": None,
        },
    ),
    "batch_norm_gradient": lambda a: (
        [a.floats(6, 3), a.floats(6, 3), a.floats(3)],
        {
            **channels(a, ("mean", "rest", "inverse", "dgamma", "dbeta")),
            "count": a.array((1,), np.int64),
            "dx": a.floats(6, 3),
            "axis": -1,
            "mask": None,
            "workspace": None,
            "threads": 1,
        },
    ),
    "batch_norm_inference": lambda a: (
        [a.floats(6, 3), *channels(a, "gbmv").values()],
        {"y": a.floats(6, 3), "axis": 1, "epsilon": 1e-3, "threads": None},
    ),
    "batch_norm_workspace": lambda a: ([a.floats(6, 3), -1], {}),
    "merge_moments": lambda a: (
        [[a.array((1,), np.int64, values=5), *channels(a, "mrv").values()]],
        {
            "window": [a.array((3,), np.int64, values=[0, 0, 3]), a.array((2, 3), np.float64, values=0)],
            "moving": [a.floats(3), a.floats(3)],
            "momentum": 0.9,
        },
    ),
    "add_to_windows": lambda a: (
        [
            [[a.array((1,), np.int64, values=5), *channels(a, "mrv").values()]],
            [[a.array((3,), np.int64, values=[0, 0, 3]), a.array((2, 3), np.float64, values=0)]],
        ],
        {"applies": True},
    ),
    "add_noise_group": lambda a: (
        [a.array((4,), np.float64, values=0), a.array((2, 3), np.float64, values=1)],
        {"share": 1.0, "starts": True},
    ),
    "end_noise_window": lambda a: (
        [
            a.array((4,), np.float64, values=1),
            [
                a.array((3,), np.float64, values=0),
                a.array((1,), np.float64, values=0),
                a.array((2,), np.int64, values=0),
            ],
        ],
        {"shares": 1.0, "steps": 3, "decay": 0.9, "scale": 1.0, "applies": True},
    ),
    "end_windows": lambda a: (
        [[a.array((3,), np.int64, values=[5, 1, 3])], [a.array((2, 3), np.float64, values=0)]],
        {"moving_means": [a.floats(3)], "moving_variances": [a.floats(3)], "momenta": [0.9], "applies": True},
    ),
    "clip_units": lambda a: (
        [[a.floats(2, 3), a.floats(4)], [a.floats(2, 3), a.floats(4)], [a.floats(2, 3), a.floats(4)]],
        {"clip_factor": 0.1, "epsilon": 1e-3, "threads": None},
    ),
    "triad": lambda a: (
        [a.floats(40), a.floats(40), a.floats(40)],
        {"scale": 2.0, "threads": None, "streaming": False},
    ),
}

DTYPES = ("f2", "f4", "f8", ">f4", "u2", "i4", "i8", "u1", "?", "c8", "O", "V2", "S3", "M8[s]", "g")


def shapes(random_, shape):
    """Another shape."""
    shape = list(shape)
    kind = random_.randrange(6)
    if kind == 0:
        return [*shape, random_.choice((0, 1, 2))]
    if kind == 1:
        return [random_.choice((0, 1, 5)), *shape]
    if kind == 2 and shape:
        return shape[:-1]
    if kind == 3 and shape:
        shape[random_.randrange(len(shape))] += random_.choice((-1, 1, 7))
        return [max(each, 0) for each in shape]
    return shape[::-1] if kind == 4 else []


def other_array(random_, arena, array):
    """An array that is like another one but for one thing."""
    shape, dtype = array.shape, array.dtype
    kind = random_.randrange(11)
    if kind == 0:
        return arena.array(shape, random_.choice(DTYPES))
    if kind <= 2:
        return arena.array(shapes(random_, shape), dtype)
    if kind == 3:
        return arena.array(shape, dtype, skip=1)
    if kind == 4:
        return arena.array((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2] if shape else array
    if kind == 5:
        return arena.array(shape[::-1], dtype).T
    if kind == 6:
        return array[::-1] if array.ndim else array
    if kind == 7:
        read_only = arena.array(shape, dtype)
        read_only.flags.writeable = False
        return read_only
    if kind == 8:
        return np.broadcast_to(np.zeros((), dtype), random_.choice((shape, (1 << 40,), (1 << 40, 1 << 15))))
    if kind == 9:
        return memoryview(array) if dtype.kind in "fiu?b" else array
    return array[1:] if array.ndim else array[()]


class Failing:
    """An object whose interface raises."""

    @property
    def __array_interface__(self):
        raise RuntimeError("no interface today")


def recursive():
    each = []
    each.append(each)
    return each


ANYTHING = (
    *(lambda each=each: each for each in (None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, -(1 << 63), 10**400)),
    *(lambda each=each: each for each in (0.5, -0.0, float("nan"), float("inf"), 1j, "", "adam", "sgd", "lion", b"x")),
    *(lambda each=each: each for each in (np.float32(1), np.True_, np.int64(3))),
    *(lambda each=each: np.array(each) for each in (True, [True, False])),
    *(lambda kind=kind: kind() for kind in (list, tuple, dict, object, set, Failing, recursive)),
    lambda: [[]],
    lambda: [None, None],
    lambda: {"a": 1},
    lambda: type,
    lambda: range(3),
    lambda: range(1 << 60),
    lambda: (each for each in ()),
    lambda: bytearray(12),
    lambda: memoryview(b"abcd"),
    lambda: np.ones(3, object),
    lambda: np.ma.ones(3, np.float32),
    lambda: np.ones(3, [("a", "f4")]),
    lambda: cuda_like(),
    lambda: cuda_like(8192, (2, 3)),
    lambda: cuda_like(0),
    lambda: cuda_like(shape=(-3,)),
    lambda: cuda_like(shape=(1 << 40,) * 3),
    lambda: cuda_like(shape=None),
    lambda: cuda_like(shape=("a",)),
    lambda: cuda_like(typestr="f"),
    lambda: cuda_like(typestr=3),
    lambda: cuda_like(strides=(4, 4)),
    lambda: cuda_like(stream=0),
    lambda: cuda_like(mask=1),
    lambda: cuda_like("a"),
)


def places(arguments):
    """All places within nested lists and dicts, as paths."""
    items = arguments.items() if isinstance(arguments, dict) else enumerate(arguments)
    for key, value in items:
        yield (key,)
        if isinstance(value, list | dict) and not holds_itself(value):
            yield from ((key, *rest) for rest in places(value))


def holds_itself(value):
    return any(each is value for each in (value.values() if isinstance(value, dict) else value))


def at(arguments, path):
    for key in path:
        arguments = arguments[key]
    return arguments


def damage(random_, arena, arguments):
    """Changes one argument, or an item within one."""
    path = random_.choice([path for path in places(arguments) if len(path) > 1])
    holder, value = at(arguments, path[:-1]), at(arguments, path)
    kind = random_.randrange(10)
    if isinstance(value, np.ndarray) and kind < 6:
        holder[path[-1]] = other_array(random_, arena, value)
    elif isinstance(value, np.ndarray) and kind == 6:  # memory that another argument has
        others = [each for each in (at(arguments, p) for p in places(arguments)) if isinstance(each, np.ndarray)]
        holder[path[-1]] = random_.choice(others)
    elif isinstance(value, list) and value and kind < 6:
        change = random_.randrange(4)
        if change == 0:
            value.pop(random_.randrange(len(value)))
        elif change == 1:
            value.append(random_.choice(value))
        elif change == 2:
            random_.shuffle(value)
        else:
            holder[path[-1]] = random_.choice((tuple, iter, len))(value)
    elif isinstance(holder, dict) and kind == 7 and len(path) == 2:
        if random_.random() < 0.5:
            del holder[path[-1]]
        else:
            holder[f"{path[-1]}_"] = value
    else:
        holder[path[-1]] = random_.choice(ANYTHING)()


def arrays_in(value):
    """The arrays within an argument."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, memoryview):
        yield np.asarray(value)
    elif isinstance(value, list | tuple):
        for each in value:
            if each is not value:
                yield from arrays_in(each)


def make_call(kernels, arena, seed, number):
    """Makes a call with one to three changes. Returns the error, or None if it was right all the same."""
    random_ = random.Random(seed << 40 | number)
    name = random_.choice(tuple(CALLS))
    arena.restart()
    positional, keywords = CALLS[name](arena)
    arguments = [list(positional), keywords]
    for _ in range(random_.choice((1, 1, 2, 3))):
        damage(random_, arena, [arguments[0], arguments[1]])
    positional, keywords = arguments
    arena.freeze()
    try:
        getattr(kernels, name)(*positional, **keywords)
    except REFUSALS as error:
        if arena.changed_outside([]):
            raise Found(f"{name} wrote before it raised {error!r}: {positional}, {keywords}") from error
        if not str(error) and not isinstance(error, MemoryError):
            raise Found(f"{name} raised {error!r}, which says nothing: {positional}, {keywords}") from error
        return error
    given = [each for value in (*positional, *keywords.values()) for each in arrays_in(value)]
    if arena.changed_outside(given):
        raise Found(f"{name} wrote outside of its arrays: {positional}, {keywords}")
    return None


def work(seed, deadline, progress):
    kernels, arena = load_kernels(), Arena()
    for name, arguments in CALLS.items():
        positional, keywords = arguments(arena)
        getattr(kernels, name)(*positional, **keywords)  # what is damaged is right
        arena.restart()
    refused = 0
    for number in range(CALLS_OF_A_PROCESS):
        progress.value = number
        refused += make_call(kernels, arena, seed, number) is not None
        if number % 256 == 0 and time.time() > deadline:
            break
    return {"calls": number + 1, "malformed calls": refused}


def part(seconds):
    return repeat(work, seconds, preload=["numpy"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--call"]:
        print(repr(make_call(load_kernels(), Arena(), *map(int, sys.argv[2:4]))))
    else:
        main(part)
