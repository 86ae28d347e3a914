"""Whether the loss of a batch is the weighted mean, or the sum, of its losses of two parts of the batch.

Only such a loss can be computed by micro-batches. The predictions of a model that has not been trained may hide that a
loss is another: those of a head of zeros are all equal, and so are the losses of both parts. So the comparison is made
with the predictions as they are, and with others that differ from them more and more from sample to sample.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.keras_model import mask_of, with_mask

Kind = Literal["splits", "unknown", "sum", "mean", "denominator", "coupled"]
"""What a loss is: `"mean"` if it was to be a sum and is a mean; `"unknown"` if the batch does not show it."""


class _Rounding(NamedTuple):
    """What rounding explains: kernels for other sizes add in another order, and on a GPU may use TensorFloat-32."""

    relative: float = 1e-4
    absolute: float = 1e-6
    """What it leaves of numbers around 1 that cancel within a loss, as in log-cosh."""


_IN_HALF_PRECISION = {tf.float16: _Rounding(2.0**-6, 2.0**-8), tf.bfloat16: _Rounding(2.0**-3, 2.0**-5)}
"""What it explains where losses are computed in half precision: 16 and 4 units in the last place."""


class Subject(NamedTuple):
    """A loss to examine, as a function of named arguments."""

    value: Callable[[dict[str, Any]], Any]
    """Returns the loss, a scalar."""
    shares: tuple[Callable[[dict[str, Any], int], Any], ...]
    """Each returns what a part counts for, of its arguments and number of samples; one of them has to be right. None of
    them if the loss is to be a sum."""
    arguments: dict[str, Any]
    """Structures of tensors, `y_pred` among them. Those with as many rows as `y_pred` are cut."""
    whole: Collection[int] = ()
    """The identities of tensors that are not cut."""


class Finding(NamedTuple):
    """What was found, and the first numbers that show it."""

    kind: Kind
    samples: int = 0
    split: int = 0
    """The number of samples in the first part."""
    found: float = 0.0
    """The loss of all samples."""
    wanted: float = 0.0
    """What the losses of both parts make."""
    summed: bool = False
    """Whether it was to be their sum, and not their mean."""
    moved: bool = False
    """Whether the numbers are those of other predictions than the model's."""


Move = Callable[[Any], Any]
"""Moves a tensor of predictions."""
Shares = list[tuple[float, float]]
"""What both parts count for, by each of the ways to count; none for a sum."""


class _Values(NamedTuple):
    """The loss of all samples, and of both parts."""

    whole: float
    first: float
    last: float


def rows_of(structure: Any) -> int | None:
    """The number of rows that all tensors of a structure have; None if they differ, or if there are no tensors."""
    leaves = [leaf for leaf in keras.tree.flatten(structure) if leaf is not None]
    if not leaves or any(not isinstance(leaf, _Tensors) or not leaf.shape.rank for leaf in leaves):
        return None
    rows = {int(leaf.shape[0]) for leaf in leaves}
    return rows.pop() if len(rows) == 1 else None


_Tensors = tf.Tensor | tf.RaggedTensor | tf.SparseTensor


def cut(structure: Any, begin: int, end: int, rows: int, whole: Collection[int] = ()) -> Any:
    """Returns a part of each tensor that has `rows` rows, with its mask; other parts of a structure stay.

    Args:
        structure: A structure of tensors.
        begin: The first row of the part.
        end: The row after its last.
        rows: The number of rows of a tensor that is cut.
        whole: The identities of tensors that are not cut.
    """

    def cut_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, _Tensors) or id(leaf) in whole or not leaf.shape.rank or leaf.shape[0] != rows:
            return leaf
        if isinstance(leaf, tf.SparseTensor):
            start = [begin] + [0] * (leaf.shape.rank - 1)
            return tf.sparse.slice(leaf, start, tf.concat([[end - begin], leaf.dense_shape[1:]], 0))
        mask = mask_of(leaf)
        return with_mask(leaf[begin:end], None if mask is None else cut_leaf(mask))

    return keras.tree.map_structure(cut_leaf, structure)


def examine(subject: Subject, split: int) -> Finding:
    """Finds whether a loss is the mean, or the sum, of its values for two parts of a batch.

    Args:
        subject: The loss.
        split: The number of samples in the first part.

    Raises:
        Exception: What the loss raises, if it cannot be computed for the whole batch or for parts of it.
    """
    rows = rows_of(subject.arguments["y_pred"])
    if rows is None or rows < 2:
        return Finding("unknown")
    try:
        return _examine_at(subject, split, rows)
    except Exception:
        for group in _groups(split, rows):  # the loss may need whole groups of neighbours, such as pairs
            with contextlib.suppress(Exception):
                return _examine_at(subject, max(group, split // group * group), rows)
        raise


class _Set(NamedTuple):
    """One set of predictions, and the losses with it."""

    arguments: dict[str, Any]
    values: _Values
    rounding: _Rounding
    moved: bool


def _examine_at(subject: Subject, split: int, rows: int) -> Finding:
    shares = _shares_at(subject, split, rows)
    sets = _sets(subject, [(), (_shift,)], split, rows)
    if len(sets) < 2 or not _shows_that_it_splits(sets[1], sets, shares):
        sets += _sets(subject, [(_shrink,)], split, rows)
    for each in sets:
        values, tolerance = each.values, _tolerance(each, sets)
        if _follows(values, shares, tolerance):
            continue
        again = float(subject.value(each.arguments))
        if abs(again - values.whole) > tolerance:  # a loss that draws random numbers
            return Finding("unknown")
        if _couples_neighbours(subject, each.arguments, split, rows, tolerance):
            return Finding("splits")
        sets += _sets(subject, [(_shift, _shift), (_shrink, _shrink)], split, rows)
        kind = _kind(not shares, split, rows, sets)
        return Finding(kind, rows, split, values.whole, _wanted(values, shares)[0], not shares, each.moved)
    return Finding("splits" if any(_shows_that_it_splits(each, sets, shares) for each in sets) else "unknown")


def _sets(subject: Subject, moves_of_sets: Sequence[Sequence[Move]], split: int, rows: int) -> list[_Set]:
    """The losses with predictions that are moved in several ways, where they are finite."""
    sets = []
    for moves in moves_of_sets:
        y_pred = subject.arguments["y_pred"]
        for move in moves:
            y_pred = keras.tree.map_structure(move, y_pred)
        arguments = subject.arguments | {"y_pred": y_pred}
        values, rounding = _values_at(subject, arguments, split, rows)
        if math.isfinite(sum(values)):
            sets.append(_Set(arguments, values, rounding, bool(moves)))
    return sets


def _shows_that_it_splits(one: _Set, sets: Sequence[_Set], shares: Shares) -> bool:
    """Whether the losses of both parts make that of all, and would not if the loss were another."""
    values, tolerance = one.values, _tolerance(one, sets)
    differ = abs(values.first - values.last) if shares else abs(values.whole)
    return differ > tolerance and _follows(values, shares, tolerance)


def _tolerance(one: _Set, sets: Sequence[_Set]) -> float:
    """What rounding explains of a difference.

    Terms of both signs may cancel: then they are larger than the loss, and so is the rounding of their sum. How much
    the loss changes with the predictions tells how large they are.
    """
    changes = [abs(one.values.whole - each.values.whole) for each in sets if each is not one]
    return one.rounding.absolute + one.rounding.relative * max(*map(abs, one.values), min(changes, default=0.0))


def _values_at(subject: Subject, arguments: dict[str, Any], split: int, rows: int) -> tuple[_Values, _Rounding]:
    """The losses of all samples and of the parts, and what rounding explains of them."""
    parts = [cut(arguments, begin, end, rows, subject.whole) for begin, end in ((0, split), (split, rows))]
    losses = [tf.convert_to_tensor(subject.value(each)) for each in (arguments, *parts)]
    if any(each.shape.rank != 0 or not each.dtype.is_floating for each in losses):
        return _Values(*[float("nan")] * 3), _Rounding()
    return _Values(*map(float, losses)), _IN_HALF_PRECISION.get(losses[0].dtype, _Rounding())


def _shares_at(subject: Subject, split: int, rows: int) -> Shares:
    """What both parts count for, by each of the ways to count."""
    first, last = (
        (cut(subject.arguments, begin, end, rows, subject.whole), end - begin)
        for begin, end in ((0, split), (split, rows))
    )
    return [(float(share(*first)), float(share(*last))) for share in subject.shares]


def _wanted(values: _Values, shares: Shares) -> list[float]:
    """The loss that both parts make: their sum, or their mean by each of the ways to count."""
    if not shares:
        return [values.first + values.last]
    return [
        (values.first * first + values.last * last) / (first + last) if first + last else 0.0 for first, last in shares
    ]


def _follows(values: _Values, shares: Shares, tolerance: float) -> bool:
    return min(abs(values.whole - each) for each in _wanted(values, shares)) <= tolerance


def _kind(summed: bool, split: int, rows: int, sets: Sequence[_Set]) -> Kind:
    """What a loss is that is not what it was to be."""
    other: Shares = [(split, rows - split)] if summed else []
    if all(_follows(each.values, other, _tolerance(each, sets)) for each in sets):
        return "mean" if summed else "sum"
    # With a denominator of targets only, the parts weigh the same whatever is predicted.
    apart = [each.values for each in sets if abs(each.values.first - each.values.last) > 1e-2 * abs(each.values.whole)]
    weights = [(each.whole - each.last) / (each.first - each.last) for each in apart]
    if len(weights) > 1 and max(weights) - min(weights) < 1e-3 and min(weights) > -1e-3 and max(weights) < 1.001:
        return "denominator"
    return "coupled"


def _groups(split: int, rows: int) -> list[int]:
    """The sizes of groups of neighbours that a batch may consist of, and of which `split` has cut one."""
    return [size for size in range(2, rows) if rows % size == 0 and split % size]


def _couples_neighbours(subject: Subject, arguments: dict[str, Any], split: int, rows: int, tolerance: float) -> bool:
    """Whether a loss couples samples in groups of neighbours only, such as pairs, of which `split` has cut one."""
    for group in _groups(split, rows):
        places = range(group, rows, group)
        places = places[:: -(-len(places) // 8)]  # some are enough
        with contextlib.suppress(Exception):  # the loss may need groups of another size
            if all(_splits_at(subject, arguments, place, rows, tolerance) for place in places):
                return True
    return False


def _splits_at(subject: Subject, arguments: dict[str, Any], place: int, rows: int, tolerance: float) -> bool:
    values, _ = _values_at(subject, arguments, place, rows)
    return _follows(values, _shares_at(subject, place, rows), tolerance)


def _moving(move: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]) -> Move:
    """Makes a function of predictions: those that are floats are moved, and keep their mask.

    Args:
        move: Takes a tensor, how much its rows are to be moved, and numbers between 0 and 1 of its shape.
    """

    @functools.wraps(move)
    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
            return leaf
        amounts = np.linspace(0.1, 0.9, leaf.shape[0]).reshape([-1] + [1] * (leaf.shape.rank - 1))
        numbers = tf.random.stateless_uniform(leaf.shape, seed=[1, 2], dtype=leaf.dtype)  # always the same
        return with_mask(move(leaf, tf.constant(amounts, leaf.dtype), numbers), mask_of(leaf))

    return moved


@_moving
def _shrink(leaf: tf.Tensor, amounts: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Probabilities stay probabilities, and numbers keep their sign; zeros get small."""
    mean = tf.reduce_mean(tf.abs(leaf))
    small = tf.where(mean > 0, tf.minimum(mean, 1), tf.constant(0.5, leaf.dtype))
    return tf.where(tf.equal(leaf, 0), small * amounts * numbers, leaf * (1 - amounts * numbers))


@_moving
def _shift(leaf: tf.Tensor, amounts: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Logits and features get far apart."""
    size = 1 + tf.sqrt(tf.reduce_mean(tf.square(leaf)))
    return leaf + size * amounts * (2 * numbers - 1)
