"""The check that micro-batches can compute a model's loss, before the first training step.

The check runs once after `compile`, on the first batch: a pass forward without gradients, and each loss for all samples
and for two parts of them. It runs eagerly and in a `keras.StatelessScope`, so that it moves no state. A batch that
cannot show what the loss is, such as one of a single sample, leaves it to a later one. These are the batches number
1, 2, 4, 8 and so on: the steps between them cost nothing.
"""

import warnings
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_losses import LossCall, following
from accumops.adapters.keras_model import mask_of, with_mask
from accumops.normalization.layer_calls import owning_windows
from accumops.training.first_batch import peek, plain
from accumops.training.splits import Finding, Subject, cut, examine, rows_of
from accumops.training.weighting import Normalization, common_divisor, count_samples, reduction_of, share_of

_MOST_PREDICTIONS = 1 << 18
"""Fewer samples are examined where they have more numbers than this: the loss of few samples shows what it is."""


class LossCheck:
    """Checks the losses of a model, at the first calls of its train functions.

    Args:
        model: The `GradientAccumulateModel`.
        whole_inputs: Returns the tensors of a batch that each micro-batch gets whole.
    """

    def __init__(self, model: Any, whole_inputs: Callable[[Any], list[tf.Tensor]]) -> None:
        self._model = model
        self._whole_inputs = whole_inputs
        self._batch: Any = None
        self.restart()

    def restart(self) -> None:
        """Has the next batch checked, as after `compile`."""
        self._done = self._model.check_loss is False or self._model.loss_over == "window"
        self._calls, self._next = 0, 1
        self._batch = None

    def remember(self, batch: Any) -> None:
        """Keeps a replica's part of a batch: a train function cannot look at what is distributed over replicas."""
        if not self._done:
            self._batch = batch

    def before(self, train: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Returns a train function that checks the loss before it trains.

        The function raises a ValueError, and trains nothing, if the loss is not what micro-batches can compute.

        Args:
            train: The train function.
        """

        def function(iterator: Any) -> Any:
            # Accumulation over windows of one micro-batch changes no loss. Their number may change.
            if self._done or self._model.accum_steps == 1:
                return train(iterator)
            self._calls += 1
            if self._calls < self._next:
                return train(iterator)
            self._next *= 2
            batch, iterator = peek(iterator, self._model.steps_per_execution)
            if batch is None:
                batch, self._batch = self._batch, None
            failure = None if batch is None else self._check(batch)
            logs = train(iterator)
            if failure is not None:
                # The step has done what the check could not, or it would have raised its own error.
                self._done = True
                warnings.warn(
                    f"The loss was not checked: half a batch, or a step outside of a function, fails with {failure!r}. "
                    "check_loss=False does without the check.",
                    stacklevel=2,
                )
            return logs

        return function

    def _check(self, batch: Any) -> Exception | None:
        """Checks the loss on a batch, and returns the error of a model or loss that cannot run here."""
        try:
            findings = self._examine(plain(batch))
        except Exception as error:
            return error
        messages = [_message(what, each) for what, each in findings if each.kind not in ("splits", "unknown")]
        self._done = bool(messages and self._model.check_loss == "warn") or all(
            each.kind == "splits" for _, each in findings
        )
        if messages and self._model.check_loss == "warn":
            warnings.warn("\n".join(messages), stacklevel=3)
        elif messages:
            self._calls, self._next = 0, 1  # a second try has to fail, too
            raise ValueError("\n".join(messages))
        return None

    def _examine(self, data: Any) -> list[tuple[str, Finding]]:
        """Examines each loss on the first micro-batches of a batch, or on its samples if it is one.

        Returns:
            What was found of each loss, with a description of the loss.
        """
        model = self._model
        overridden = type(model).compute_loss is not keras.Model.compute_loss
        if model.loss is None and not overridden:
            return []
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        rows = int(count_samples(x, y))
        size = model.micro_batch_size or rows
        used = min(2 * size, rows)
        split = used // 2 if model.micro_batch_size is None else size
        if not 0 < split < used:  # one sample, or a window of one micro-batch
            return [("", Finding("unknown"))]
        whole = {id(each) for each in self._whole_inputs(data)}
        x, y, sample_weight = (cut(each, 0, used, rows, whole) for each in (x, y, sample_weight))
        if not model.model.built:
            model(cut(x, 0, min(size, used), used, whole), training=False)
        values = [(variable, variable.value) for variable in model.trainable_variables]  # which regularizers ask for
        with keras.StatelessScope(values), owning_windows(lambda layer: layer.windows()[0]):
            y_pred = self._predict(x, size, used, whole)
            given = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
            with following(None, model) as calls:
                model.compute_loss(**given, training=True)
            results = [
                (_description(call), examine_call(call, split, model.normalization, given, whole)) for call in calls
            ]
            if overridden and all(each.kind == "splits" for _, each in results):
                results.append((f"`compute_loss` of {type(model).__name__}", self._examine_all(given, split, whole)))
        return results

    def _predict(self, x: Any, size: int, used: int, whole: set[int]) -> Any:
        """The model's outputs in training, by micro-batches as in a step."""
        parts = [
            self._model(cut(x, begin, min(begin + size, used), used, whole), training=True)
            for begin in range(0, used, size)
        ]
        return keras.tree.map_structure(_joined, *parts)

    def _examine_all(self, given: dict[str, Any], split: int, whole: set[int]) -> Finding:
        """Examines what a `compute_loss` of the model's own returns."""
        model = self._model
        sums = model.optimizer.accumulator.reduction == "sum"
        if sums and model.losses:
            return Finding("splits")  # refused by the step

        def value(arguments: dict[str, Any]) -> Any:
            with following(None, model):
                return model.compute_loss(**arguments, training=True)

        def share(arguments: dict[str, Any], samples: int) -> Any:
            with following(None, model) as calls:
                model.compute_loss(**arguments, training=True)
            x, y, sample_weight = (arguments[each] for each in ("x", "y", "sample_weight"))
            counted = {"samples": tf.constant(samples), "x": x, "y": y, "sample_weight": sample_weight}
            return share_of(model.normalization, calls, **counted, dtype=tf.float64, on_replica=False)

        shares = () if sums else (share, lambda arguments, samples: samples)
        return _examine_part(Subject(value, shares, given, whole), split)


def examine_call(
    call: LossCall,
    split: int,
    normalization: str | Normalization = "auto",
    given: dict[str, Any] | None = None,
    whole: Collection[int] = (),
) -> Finding:
    """Examines the loss of an output.

    A `normalization` that was chosen weighs micro-batches by what the user counts. A loss passes that is a mean by this
    number, and one that is a mean by what it divides by itself, which was then left out knowingly.

    Args:
        call: What the loss was called with.
        split: The number of samples in the first part.
        normalization: The model's `normalization`.
        given: The inputs, targets and sample weights of the model, for a callable `normalization`.
        whole: The identities of tensors that are no batch.
    """
    names = ("y_true", "y_pred", "sample_weight")
    arguments = {name: getattr(call, name) for name in names}
    if callable(normalization) and given is not None:
        arguments |= {f"model's {name}": given[name] for name in ("x", "y", "sample_weight")}

    def value(arguments: dict[str, Any]) -> Any:
        return call.loss(*(arguments[name] for name in names))

    def divisor(arguments: dict[str, Any], samples: int) -> Any:
        found = common_divisor([call._replace(**{name: arguments[name] for name in names})], tf.float64)
        return samples if found is None else found

    def chosen(arguments: dict[str, Any], samples: int) -> Any:
        assert callable(normalization)
        return normalization(*(arguments[f"model's {name}"] for name in ("x", "y", "sample_weight")))

    shares: tuple[Callable[[dict[str, Any], int], Any], ...] = (divisor,)
    if reduction_of(call.loss) == "sum":
        shares = ()
    elif callable(normalization):
        shares = (chosen, divisor)
    return _examine_part(Subject(value, shares, arguments, whole), split)


def _examine_part(subject: Subject, split: int) -> Finding:
    """Examines a loss on the first of its samples, if they have very many predictions."""
    arguments = subject.arguments
    rows = rows_of(arguments["y_pred"])
    y_true, weights = arguments.get("y_true", arguments.get("y")), arguments["sample_weight"]
    if rows is None or rows <= split or not _are_rows(y_true, rows) or not _are_rows(weights, rows, broadcast=True):
        return Finding("unknown")
    predictions = sum(leaf.shape.num_elements() or 0 for leaf in keras.tree.flatten(arguments["y_pred"]))
    used = rows
    while used >= 8 and predictions * used > _MOST_PREDICTIONS * rows:
        used //= 2
    if used < rows:
        subject = subject._replace(arguments=cut(arguments, 0, used, rows, subject.whole))
        split = used // 2
    y_pred = keras.tree.map_structure(_as_compared, subject.arguments["y_pred"])
    return examine(subject._replace(arguments=subject.arguments | {"y_pred": y_pred}), split)


def _are_rows(structure: Any, rows: int, *, broadcast: bool = False) -> bool:
    """Whether all tensors of a structure are of as many rows, or of one that stands for all."""
    return all(
        rows_of(leaf) == rows or (broadcast and (tf.rank(leaf) == 0 or rows_of(leaf) == 1))
        for leaf in keras.tree.flatten(structure)
        if leaf is not None
    )


def _as_compared(leaf: Any) -> Any:
    """Predictions in float32, as sums in half precision would be too far off; and without logits, which no part has."""
    if not isinstance(leaf, tf.Tensor):
        return leaf
    half = leaf.dtype in (tf.float16, tf.bfloat16)
    return with_mask(tf.cast(leaf, tf.float32) if half else tf.identity(leaf), mask_of(leaf))


def _joined(*parts: Any) -> Any:
    """Outputs of several micro-batches one after another, with their masks."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tf.SparseTensor):
        return tf.sparse.concat(0, parts)
    masks = [mask_of(part) for part in parts]
    mask = None if any(each is None for each in masks) else tf.concat(masks, 0)
    return with_mask(tf.concat(parts, 0), mask)


def _description(call: LossCall) -> str:
    name = getattr(call.loss, "name", type(call.loss).__name__)
    return f"The loss '{name}'" + (f" of the output '{call.output}'" if call.output != name else "")


_REMEDIES = {
    "sum": "It looks like a sum over samples. Return one value for each sample, or make it a `keras.losses.Loss` with "
    "reduction='sum'.",
    "mean": "It looks like a mean, although its reduction is 'sum'. Return one value for each sample, or make the "
    "reduction 'sum_over_batch_size'.",
    "denominator": "It looks like a mean that divides by a number of its own, such as a count of valid positions. "
    "Return one value for each sample or position, and leave out positions by `sample_weight`, `ignore_class` or a "
    "mask. Or give the model this number as `normalization`, a callable `(x, y, sample_weight) -> scalar`; or, with "
    "`micro_batch_size`, loss_over='window'.",
    "coupled": "It looks like a loss that couples the samples of a batch, such as a contrastive loss or a score of the "
    "whole batch. Each micro-batch couples its own samples only. Larger micro-batches come nearer to the loss "
    "of the large batch. With `micro_batch_size`, loss_over='window' is the loss of the large batch.",
}


def _message(what: str, finding: Finding) -> str:
    parts = "sum" if finding.summed else "mean"
    moved = ", with predictions that were moved apart" if finding.moved else ""
    return (
        f"{what} cannot be accumulated from micro-batches: it is {finding.found:.7g} for {finding.samples} samples, "
        f"and the {parts} of its values for the first {finding.split} and the other {finding.samples - finding.split} "
        f"is {finding.wanted:.7g}{moved}. {_REMEDIES[finding.kind]} To train all the same, make the model with "
        "check_loss='warn' or False."
    )
