"""One training step of a `GradientAccumulateModel`.

    accum_steps        a batch is one micro-batch: pass, then `optimizer.apply`, which ends the window if it is full
    micro_batch_size   a batch is a window: for each slice a pass and `optimizer.accumulate_slice`, then
                       `optimizer.close`; with `loss_over="window"` as in `window_loss.py`

A pass goes forward and backward over a micro-batch, updates the metrics, and weighs the micro-batch. The mean of the
loss in the logs is weighed like the gradients' mean. A metric function that gives one value for a batch is counted when
all of the batch has been seen: its micro-batches count by their samples, and the batch counts once.

With `nonfinite="skip"` and `"drop"` a pass may turn out not to count. Then what it has moved is taken back before its
gradients can end a window, and its loss has no weight in the logs.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from accumops.adapters.keras_losses import following
from accumops.adapters.keras_metrics import count_scalars, number_of_metrics, scalars_of, stack
from accumops.adapters.keras_model import loss_tracker
from accumops.memory.slices import Slices, whole_tensors
from accumops.normalization.pending_moments import moments_wait
from accumops.training.layerwise_step import LayerwiseStep, layerwise_step
from accumops.training.left_out import Undo
from accumops.training.slicing import Carried, fold_slices
from accumops.training.weighting import count_samples, share_of
from accumops.training.window_loss import WindowLoss
from accumops.window.current_window import CurrentWindow, within_window
from accumops.window.nonfinite import Share


class Pass(NamedTuple):
    """What forward and backward over a micro-batch give."""

    gradients: list[Any] | None
    """None of a model that has nothing to train."""
    share: float | tf.Tensor | Share
    """What the micro-batch counts for in its window."""
    loss: float | tf.Tensor
    """The mean over its samples."""
    samples: int | tf.Tensor
    scalars: tf.Tensor | None = None
    """What metric functions give for the micro-batch as a whole, times samples, if it is to be counted later."""
    counts: bool | tf.Tensor = True
    """Whether it counts in the logs; if not, loss and samples are 0."""


class TrainingStep:
    """Steps of a model.

    Args:
        model: The `GradientAccumulateModel`, compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._compiled_pass: Any = None
        self._window_loss: WindowLoss | None = None
        self._layerwise: LayerwiseStep | None = None
        self._samples_of_window: tuple[tf.Tensor, ...] = ()

    def start_anew(self) -> None:
        """Forgets what was known of the model: it has been compiled."""
        self._compiled_pass = None
        self._layerwise = layerwise_step(self._model)
        over_window = self._model.loss_over == "window"
        self._window_loss = WindowLoss(self._model, self._layerwise) if over_window else None

    def compile_passes(self, compiled: bool) -> None:
        """Has XLA compile each pass by itself, or no longer."""
        self._compiled_pass = (
            tf.function(self._whole_pass, jit_compile=True, reduce_retracing=True, autograph=False)
            if compiled
            else None
        )

    @property
    def compiled_pass(self) -> Callable[[Any], Pass] | None:
        """The function that XLA compiles for each pass, or None."""
        return self._compiled_pass

    def train(self, data: Any, ends_window: bool | None) -> None:
        """Trains on a batch.

        Args:
            data: The batch.
            ends_window: With `accum_steps`, whether the step ends its window; None leaves it to the counters.
        """
        if self._model.micro_batch_size is None:
            self._train_on_micro_batch(data, ends_window)
        else:
            self.accumulate(data)
            self.end_window()

    def evaluate(self, data: Any) -> dict[str, Any]:
        """Evaluates a batch, or the part of it that a replica of a strategy has, and returns the metrics."""
        model = self._model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        samples = count_samples(x, y)
        if model.mirroring is not None and tf.executing_eagerly() and int(samples) == 0:
            return model.get_metrics_result()
        y_pred = model(x, training=False)
        with following(samples, model):
            loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        loss_tracker(model).update_state(self._mean_loss(loss, samples), sample_weight=samples)
        scalars = self._compute_metrics(x, y, y_pred, sample_weight, samples if model.mirroring is not None else None)
        if scalars is not None:
            count_scalars(model, scalars, samples)
        return model.get_metrics_result()

    def _train_on_micro_batch(self, data: Any, ends_window: bool | None) -> None:
        model, optimizer = self._model, self._model.optimizer
        passed = self._counted_pass(data)
        if passed.gradients is not None:
            take = {None: optimizer.apply, False: optimizer.accumulate, True: optimizer.close}[ends_window]
            take(passed.gradients, model.trainable_variables, weight=passed.share)
        loss_tracker(model).update_state(passed.loss, sample_weight=passed.samples)
        if passed.scalars is not None:
            count_scalars(model, passed.scalars, passed.samples)

    def accumulate(self, data: Any) -> None:
        """Accumulates the gradients of a batch's micro-batches, and counts them in the logs. The window stays open.

        Args:
            data: The batch.
        """
        size = self._model.micro_batch_size
        samples = count_samples(*keras.utils.unpack_x_y_sample_weight(data)[:2])
        self._samples_of_window = (samples,)
        try:
            with self._model.optimizer.accumulator.state.filling():
                if self._window_loss is not None:
                    with within_window(self._window(samples, samples)):
                        self._accumulate_window(data, size, self._window_loss)
                elif self._layerwise is not None:
                    with within_window(self._window(samples, samples)):
                        self._accumulate_layerwise(data, size, self._layerwise)
                else:
                    self._accumulate_slices(data, size)
        finally:
            self._samples_of_window = ()

    def end_window(self) -> None:
        """Ends the window of `accumulate` with an update."""
        optimizer = self._model.optimizer
        if optimizer.accumulator.built and self._model.trainable_variables:
            optimizer.close()

    def _accumulate_slices(self, data: Any, size: int) -> None:
        model, optimizer = self._model, self._model.optimizer
        if optimizer.accumulator.built:
            optimizer.accumulator.reset()  # a step that failed may have left a window open
        tracker = loss_tracker(model)
        # Not the tracker's dtype, which may be a half precision, in which sums over many slices are far off.
        none = tf.zeros([], self._share_dtype())
        # Each slice adds to all of these: XLA fails where a loop hands a constant on as it is.
        scalars = [tf.zeros([number], none.dtype)] if (number := number_of_metrics(model)) else []
        slices, (total, losses, logged, seen, *scalars) = fold_slices(
            data,
            size,
            self.train_on_slice,
            [none, none, none, none, *scalars],
            static_sizes=bool(model.jit_compile) and not model.compiles_passes,
            at_once=model.parallel_micro_batches,
            empty=model.mirroring is not None,
            uncut=self.whole_inputs(data),
        )
        # The window and the mean of the losses are counted when all micro-batches have run.
        if optimizer.accumulator.built and model.trainable_variables:
            optimizer.accumulator.state.count(slices, total)
        value = losses if self._sums() else tf.math.divide_no_nan(losses, logged)
        tracker.update_state(tf.cast(value, tracker.dtype), sample_weight=seen)
        for each in scalars:
            count_scalars(model, each, seen)

    def _accumulate_window(self, data: Any, size: int, window_loss: WindowLoss) -> None:
        model, optimizer = self._model, self._model.optimizer
        if not optimizer.accumulator.built:
            raise ValueError(
                f"loss_over='window' needs the weights of '{model.name}' before the first step. Call the model that it "
                "wraps with a batch, or give it to `model.build`, before it is wrapped."
            )
        optimizer.accumulator.reset()  # as above
        passed = window_loss.train(data, size, self.whole_inputs(data), self._share_dtype())
        # Gradients of parts of one loss are added, and not averaged.
        state = optimizer.accumulator.state
        count = state.count if self._layerwise is None else state.count_parts
        count(passed.slices, tf.ones([], self._share_dtype()) + tf.cast(passed.left, self._share_dtype()))
        loss_tracker(model).update_state(self._mean_loss(passed.loss, passed.samples), sample_weight=passed.samples)

    def _accumulate_layerwise(self, data: Any, size: int, layerwise: LayerwiseStep) -> None:
        model, state = self._model, self._model.optimizer.accumulator.state
        model.optimizer.accumulator.reset()  # as above
        none = tf.zeros([], self._share_dtype())
        number = number_of_metrics(model)
        sums = {"total": [none], "losses": [none], "seen": [none]}
        sums["scalars"] = [tf.zeros([number], none.dtype)] if number else []
        undo = Undo(model) if state.nonfinite.acts else None

        def count(data: Any, y_pred: Any, calls: Any, loss: tf.Tensor, added: tf.Tensor | None, sums: Any) -> tf.Tensor:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            samples = count_samples(x, y)
            self._check_sums()
            scalars = self._compute_metrics(x, y, y_pred, sample_weight, samples)
            share = tf.cast(self._share(calls, data, samples), none.dtype)
            loss = self._mean_loss(loss if added is None else loss + tf.cast(added, loss.dtype), samples)
            sums["total"] = [sums["total"][0] + share]
            sums["losses"] = [sums["losses"][0] + tf.math.multiply_no_nan(tf.cast(loss, none.dtype), share)]
            sums["seen"] = [sums["seen"][0] + tf.cast(samples, none.dtype)]
            if scalars is not None:
                sums["scalars"] = [each + scalars for each in sums["scalars"]]
            return share

        slices = Slices(data, size, empty=model.mirroring is not None, uncut=self.whole_inputs(data))
        number, left, sums = layerwise.train(slices, bool(model.jit_compile), count, sums)
        (total,), (losses,), (seen,) = sums["total"], sums["losses"], sums["seen"]
        state.count_parts(number, total + tf.cast(left, total.dtype))
        tracker = loss_tracker(model)
        value = losses if self._sums() else tf.math.divide_no_nan(losses, total)
        if undo is not None:  # a sample that is not finite makes all of its window so
            counts = tf.math.is_finite(value)
            undo.unless(counts)
            value, seen = (tf.where(counts, each, tf.zeros_like(each)) for each in (value, seen))
        tracker.update_state(tf.cast(value, tracker.dtype), sample_weight=seen)
        for each in sums["scalars"]:
            count_scalars(model, each, seen)

    def whole_inputs(self, data: Any) -> list[tf.Tensor]:
        """The inputs that each micro-batch gets whole.

        Raises:
            ValueError: If the model's `whole_inputs` names an input that is not there.
        """
        return whole_tensors(data, self._model.whole_inputs)

    def train_on_slice(self, data: Any, first: tf.Tensor | bool, last: tf.Tensor | bool, carried: Carried) -> Carried:
        """Trains on one of the micro-batches of a batch.

        Args:
            data: The micro-batch.
            first: Whether it is the first of its batch.
            last: Whether it is the last one.
            carried: The sums before it: shares, losses times shares, shares that count in the logs, samples and, with
                metrics, scalars.

        Returns:
            The sums with it.
        """
        model = self._model
        total, losses, logged, seen, *scalars = carried
        passed = self._counted_pass(data)
        if passed.gradients is not None:
            model.optimizer.accumulate_slice(
                passed.gradients, model.trainable_variables, weight=passed.share, starts=first, last=last
            )
        weight = passed.share.weight if isinstance(passed.share, Share) else passed.share
        share = tf.cast(weight, total.dtype)
        # A share of 0 counts as nothing, whatever the loss is.
        losses += tf.math.multiply_no_nan(tf.cast(passed.loss, losses.dtype), share)
        logged += tf.where(passed.counts, share, tf.zeros_like(share))
        if passed.scalars is not None:
            scalars = [each + passed.scalars for each in scalars]
        return total + share, losses, logged, seen + tf.cast(passed.samples, seen.dtype), *scalars

    def _counted_pass(self, data: Any) -> Pass:
        """A pass that has left no trace, and counts for nothing in the logs, if it does not count.

        With "skip" its gradients decide, which are looked at here. With "drop" its loss decides, since the window finds
        out about the gradients later.
        """
        optimizer = self._model.optimizer
        nonfinite = optimizer.accumulator.state.nonfinite
        if not nonfinite.acts:
            return self._pass(data, self._compiled_pass or self._whole_pass)
        if self._compiled_pass is not None:
            # Makes variables that metrics make when they are called.
            self._compiled_pass.get_concrete_function(data, *self._samples_of_window)
        undo = Undo(self._model)
        with moments_wait() as pending:
            passed = self._pass(data, self._compiled_pass or self._forward_and_backward)
        share, counts = passed.share, tf.math.is_finite(passed.loss)
        if nonfinite.policy == "skip" and passed.gradients is not None:
            share = nonfinite.share(passed.gradients, passed.share)
            counts = share.counts & (counts | tf.not_equal(share.weight, 0))
        undo.unless(counts, but=pending.variables)
        pending.add(counts)
        loss, samples = (tf.where(counts, each, tf.zeros_like(each)) for each in (passed.loss, passed.samples))
        scalars = passed.scalars
        if scalars is not None:
            scalars = tf.where(counts, scalars, tf.zeros_like(scalars))
        return Pass(passed.gradients, share, loss, samples, scalars, counts)

    def _pass(self, data: Any, run: Callable[..., Pass]) -> Pass:
        model = self._model
        if (
            model.mirroring is not None
            and tf.executing_eagerly()
            and int(count_samples(*keras.utils.unpack_x_y_sample_weight(data)[:2])) == 0
        ):
            # Keras's losses of no samples are no scalars. The replica takes part in the window all the same.
            return Pass([tf.zeros_like(each) for each in model.trainable_variables], 0.0, 0.0, 0)
        return run(data, *self._samples_of_window)

    def _whole_pass(self, data: Any, *samples_of_window: tf.Tensor) -> Pass:
        with moments_wait() as pending:
            passed = self._forward_and_backward(data, *samples_of_window)
        pending.add()
        return passed

    def _forward_and_backward(self, data: Any, *samples_of_window: tf.Tensor) -> Pass:
        model = self._model
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        samples = count_samples(x, y)
        with within_window(self._window(samples, *samples_of_window)), tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            with following(samples, model) as calls:
                loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            scaled = model.optimizer.scale_loss(loss)
        self._check_sums()
        is_part = model.micro_batch_size is not None or model.mirroring is not None
        scalars = self._compute_metrics(x, y, y_pred, sample_weight, samples if is_part else None)
        share = self._share(calls, data, samples)
        mean_loss = self._mean_loss(loss, samples)
        variables = model.trainable_variables
        if not variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            return Pass(None, share, mean_loss, samples, scalars)
        return Pass(tape.gradient(scaled, variables), share, mean_loss, samples, scalars)

    def _check_sums(self) -> None:
        if self._sums() and self._model.losses:
            raise ValueError(
                "With a loss of reduction='sum', regularizers and `add_loss` would count once for each micro-batch, "
                "and not once for the large batch. Use a loss that is a mean, or the optimizer's `weight_decay`."
            )

    def _share(self, calls: Any, data: Any, samples: int | tf.Tensor) -> float | tf.Tensor:
        """What a micro-batch counts for in its window."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return share_of(
            self._model.normalization,
            calls,
            samples=samples,
            x=x,
            y=y,
            sample_weight=sample_weight,
            dtype=self._share_dtype(),
            on_replica=self._model.mirroring is not None,
        )

    def _window(self, samples: tf.Tensor, samples_of_window: tf.Tensor | None = None) -> CurrentWindow:
        """What a layer can ask about the window of a micro-batch.

        Args:
            samples: The samples of the micro-batch.
            samples_of_window: Those of the window, with `micro_batch_size`.
        """
        if samples_of_window is not None:
            size = self._model.micro_batch_size
            return CurrentWindow(lambda: samples_of_window, lambda: (samples_of_window + size - 1) // size)
        counters = self._model.optimizer.accumulator.state.counters

        def steps() -> tf.Tensor:
            return tf.cast(counters.with_next(counters.starts)[0], tf.int32)

        return CurrentWindow(lambda: samples * steps(), steps)

    def _compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, samples: tf.Tensor | None
    ) -> tf.Tensor | None:
        """Updates metrics. Of a part of a batch with so many samples, returns what has still to be counted."""
        model = self._model
        if samples is None:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
            return None
        with scalars_of(model) as scalars:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return stack(model, scalars, samples, self._share_dtype())

    def _sums(self) -> bool:
        """Whether losses are sums over samples, and not means."""
        return bool(self._model.optimizer.accumulator.reduction == "sum")

    def _share_dtype(self) -> tf.DType:
        """Float64 for models with float64 variables, whose gradients shares scale, else float32."""
        dtypes = {tf.as_dtype(variable.dtype) for variable in self._model.trainable_variables}
        return tf.float64 if tf.float64 in dtypes or loss_tracker(self._model).dtype == "float64" else tf.float32

    def _mean_loss(self, loss: tf.Tensor, samples: tf.Tensor) -> tf.Tensor:
        """The mean over a replica's samples: Keras divides losses by the number of replicas."""
        strategy = self._model.mirroring
        if strategy is None:
            return loss
        return tf.where(samples > 0, loss * strategy.num_replicas_in_sync, tf.zeros_like(loss))
