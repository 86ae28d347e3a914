"""A model that trains with windows of micro-batches: batch by batch in `fit`, or split from each batch in its step.

accum_steps=K           a `fit` step is one micro-batch; every K-th ends a window with an update
micro_batch_size=b      a `fit` step is a window: its batch is split into micro-batches of b samples, and one update
                        is made. To `fit`, its callbacks, schedules and metrics this is large-batch training.
"""

import contextlib
import numbers
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters import keras_losses
from accumops.arguments import Schedule, check_accum_steps, check_bool
from accumops.normalization.layer import AccumBatchNormalization, owning_windows
from accumops.optimizer.optimizer import Clipping, GradientAccumulateOptimizer, check_gradient_clipping
from accumops.training.callbacks import PARTIAL_WINDOWS, AccumStepsScheduler, PartialWindow
from accumops.training.slicing import Carried, fold_slices
from accumops.training.train_function import function_of_workers, train_function
from accumops.window import replicas

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_NORMALIZATIONS = ("samples", "steps", "weights")

Weighting = Callable[[Any, Any, Any], tf.Tensor]


class _Pass(NamedTuple):
    """What forward and backward of a micro-batch give."""

    gradients: list[Any] | None  # None of a model that has nothing to train
    weight: float | tf.Tensor  # its share in the window
    loss: float | tf.Tensor  # the mean over its samples
    samples: int | tf.Tensor


@keras.saving.register_keras_serializable(package="accumops")
class GradientAccumulateModel(keras.Model):
    """Trains a model with windows of micro-batches, whose gradients make one update: that of the whole window.

    Give it the model, or the `inputs` and `outputs` of one. The wrapped model keeps its layers and weights: predict
    with either, and save `model.model` to have it without accumops. Exactly one of `accum_steps` and
    `micro_batch_size` says how a window is run:

    - `accum_steps=K`: each batch of `fit` is a micro-batch, and every K-th makes an update.
    - `micro_batch_size=b`: each batch of `fit` is a window, which the step splits into micro-batches of b samples; they
      run one after another, so that activations take the memory of one. A last batch of any size is handled exactly.
      Batch size, steps, schedules, callbacks and metrics are those of training with the large batch.

    A layer that looks at a whole batch, such as batch normalization, sees micro-batches. A loss of `add_loss` that is a
    sum over the batch, and not a mean, is averaged over the window's micro-batches.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) create and compile it within
    `strategy.scope()`. A batch of `fit` is that of all replicas together, and with `micro_batch_size` each splits its
    own share. Replicas communicate where a window ends, once, and the update is that of one device with all samples,
    however many each replica got.

    Args:
        model: The `keras.Model` to train, with no `train_step` of its own.
        accum_steps: Micro-batches a window: an int of at least 1; or a dict of epochs, counted from 0, to the number
            from this epoch on; or a callable that gives it for the count of updates so far, an int64 scalar. A change,
            also of an int by setting the attribute, holds from the next window on.
        micro_batch_size: Samples a micro-batch, an int of at least 1.
        parallel_micro_batches: With `micro_batch_size`, how many micro-batches TensorFlow may run side by side, for who
            has the memory for their activations. Gradients and metrics add up in the same order.
        normalization: What a micro-batch counts for in the mean over its window: `"samples"` (their number, right for
            losses that are means over samples), `"steps"` (all the same), `"weights"` (what the loss divides by: the
            sum of sample weights where its reduction is `"mean_with_sample_weight"`, else the valid positions of the
            predictions' mask) or a callable `(x, y, sample_weight) -> scalar`.
        partial_window: What becomes of a window that an epoch's end leaves open, with `accum_steps`: `"flush"` (an
            update, correctly weighted), `"carry"` (it goes on in the next epoch) or `"drop"`.
        gradient_clipping: As for `GradientAccumulateOptimizer`.
        lazy_sparse: As for `GradientAccumulateOptimizer`.
        inputs: Instead of `model`, with `outputs`: those of a functional model.
        outputs: Instead of `model`, with `inputs`.
        name: The name of this model.

    Raises:
        TypeError: If `model` is not a Keras model, or a number is not an int.
        ValueError: If arguments exclude each other, are out of range, or the model has a `train_step` of its own.

    Example:

    >>> inputs = keras.Input((3,))
    >>> model = accumops.GradientAccumulateModel(
    ...     inputs=inputs, outputs=keras.layers.Dense(1)(inputs), micro_batch_size=16
    ... )
    >>> model.compile(keras.optimizers.Adam(1e-3), loss="mse")
    >>> history = model.fit(tf.ones([100, 3]), tf.ones([100, 1]), batch_size=64, verbose=0)
    >>> int(model.optimizer.iterations)
    2
    """

    jit_compile: bool  # Keras's property

    def __init__(
        self,
        model: keras.Model | None = None,
        *,
        accum_steps: int | dict[int, int] | Schedule | None = None,
        micro_batch_size: int | None = None,
        parallel_micro_batches: int = 1,
        normalization: str | Weighting = "samples",
        partial_window: str = "flush",
        gradient_clipping: Clipping | None = None,
        lazy_sparse: bool = False,
        inputs: Any = None,
        outputs: Any = None,
        name: str | None = None,
    ) -> None:
        model = _check_model(model, inputs, outputs)
        _check_mode(accum_steps, micro_batch_size, parallel_micro_batches)
        if normalization not in _NORMALIZATIONS and not callable(normalization):
            raise ValueError(
                f"`normalization` must be one of {_NORMALIZATIONS} or a callable. Received: {normalization!r}"
            )
        if partial_window not in PARTIAL_WINDOWS:
            raise ValueError(f"`partial_window` must be one of {PARTIAL_WINDOWS}. Received: {partial_window!r}")
        check_gradient_clipping(gradient_clipping)
        check_bool("lazy_sparse", lazy_sparse)
        # Inputs reach the wrapped model as they are; what it casts, it casts itself.
        super().__init__(name=name, autocast=False)
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True
        self.model = model
        if hasattr(model, "output_names"):  # by which losses and metrics are found, and called in the logs
            self.output_names = model.output_names
        # A tuple, as Keras and TensorFlow would track a dict, and refuse to save its keys.
        self._epochs = tuple(accum_steps.items()) if isinstance(accum_steps, dict) else None
        self._accum_steps = accum_steps[0] if isinstance(accum_steps, dict) else check_accum_steps(accum_steps)
        self.micro_batch_size = None if micro_batch_size is None else int(micro_batch_size)
        self.parallel_micro_batches = int(parallel_micro_batches)
        self.normalization = normalization
        self.partial_window = partial_window
        self.gradient_clipping = gradient_clipping
        self.lazy_sparse = lazy_sparse
        # In a namespace, where TensorFlow does not find functions to export.
        self._functions = types.SimpleNamespace(flush=None, forward_and_backward=self._forward_and_backward)
        self._ends_window: bool | None = None
        if model.built:
            self.built = True
            self._build_shapes_dict = getattr(model, "_build_shapes_dict", None)

    @property
    def accum_steps(self) -> int | dict[int, int] | Schedule | None:
        """Micro-batches a window, as given, or None with `micro_batch_size`. An int can be set."""
        if self._epochs is not None:
            return dict(self._epochs)
        optimizer = getattr(self, "optimizer", None)
        return self._accum_steps if optimizer is None else optimizer.accum_steps

    @accum_steps.setter
    def accum_steps(self, accum_steps: int) -> None:
        if not isinstance(self.accum_steps, int) or not isinstance(check_accum_steps(accum_steps), int):
            raise ValueError(
                f"`accum_steps` can be changed from one int to another. Received: {accum_steps!r} instead of "
                f"{self.accum_steps!r}"
            )
        self._accum_steps = int(accum_steps)
        if getattr(self, "optimizer", None) is not None:
            self.optimizer.accum_steps = self._accum_steps

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Calls the wrapped model."""
        return self.model(inputs, training=training)

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped model, or leaves it to its first call, if it does not say how."""
        if not self.model.built and input_shape is not None and type(self.model).build is not keras.Model.build:
            self.model.build(input_shape)
        self.built = True

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: str | bool | None = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures training, as `keras.Model.compile` does.

        Args:
            optimizer: The optimizer that makes one update a window. It is wrapped in a `GradientAccumulateOptimizer`;
                this model's own, from an earlier `compile`, goes on with its state.
            loss: The loss, or one for each output; their reductions have to be means.
            loss_weights: As for `keras.Model.compile`.
            metrics: As for `keras.Model.compile`.
            weighted_metrics: As for `keras.Model.compile`.
            run_eagerly: As for `keras.Model.compile`.
            steps_per_execution: As for `keras.Model.compile`.
            jit_compile: As for `keras.Model.compile`.
            auto_scale_loss: Whether a `mixed_float16` model gets a `LossScaleOptimizer`, inside that wrapper: a window
                with a gradient that is not finite is dropped, and the scale backs off. Keras's SwapEMAWeights callback
                does not find the moving averages through it.

        Raises:
            ValueError: If the optimizer accumulates gradients itself, or a loss has a reduction that no weighted mean
                of micro-batches gives.
        """
        _check_losses(loss, self.normalization)
        if optimizer is getattr(self, "optimizer", None) and isinstance(optimizer, GradientAccumulateOptimizer):
            optimizer = optimizer.inner_optimizer
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if auto_scale_loss and self.model.dtype_policy.name == "mixed_float16" and not scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        if isinstance(self.accum_steps, int):
            self._accum_steps = self.accum_steps  # a callback may have changed the optimizer's
        wrapped = GradientAccumulateOptimizer(
            optimizer, self._accum_steps, gradient_clipping=self.gradient_clipping, lazy_sparse=self.lazy_sparse
        )
        super().compile(
            wrapped,
            loss,
            loss_weights,
            metrics,
            weighted_metrics,
            run_eagerly,
            steps_per_execution,
            jit_compile,
            auto_scale_loss=False,
        )
        if self._mirroring is not None and self.jit_compile:
            raise ValueError(
                f"`jit_compile=True` does not work under {type(self._mirroring).__name__}: what replicas do together "
                "at a window's end is not compiled by XLA. Leave it out."
            )
        wrapped.jit_compile = bool(self.jit_compile) and not self._compiles_passes
        for layer in self._normalizations():
            self._adopt(layer)
        # What was given is what is saved: `compile` wraps it anew.
        self._compile_config.config["optimizer"] = optimizer
        self._functions = types.SimpleNamespace(flush=None, forward_and_backward=self._forward_and_backward)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the wrapped model for inference, which is this model's, as its own `export` does.

        Args:
            filepath: Where to.
            *args: As `keras.Model.export` takes them.
            **kwargs: As `keras.Model.export` takes them: `format`, `verbose`, `input_signature`, …
        """
        self.model.export(filepath, *args, **kwargs)

    @property
    def _default_save_signature(self) -> Any:
        """What `tf.saved_model.save` takes: the wrapped model knows the shapes and dtypes of its inputs."""
        return self.model._default_save_signature

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Runs one micro-batch, or with `micro_batch_size` one window.

        Args:
            data: A batch, as `fit` gives it.

        Returns:
            The metrics, by name.
        """
        if self.model.built and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        with owning_windows(self._adopt):
            return self._run_step(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates a batch.

        Args:
            data: A batch, as `evaluate` gives it.

        Returns:
            The metrics, by name.
        """
        if self._mirroring is None:
            return super().test_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        samples = _count_samples(x)
        if tf.executing_eagerly() and int(samples) == 0:
            return self.get_metrics_result()
        y_pred = self(x, training=False)
        with keras_losses.weighted_by(samples, self):
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        self._loss_tracker.update_state(self._mean_loss(loss, samples), sample_weight=samples)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def make_train_function(self, force: bool = False) -> Callable[[Any], dict[str, Any]]:
        """Returns the function that `fit` calls with an iterator, once a step.

        Args:
            force: Whether to make it anew where there is one.
        """
        made: Callable[[Any], dict[str, Any]] | None = getattr(self, "train_function", None)
        if made is None or force:
            if self._mirroring is not None and self.steps_per_execution > 1:
                raise ValueError(
                    f"`steps_per_execution` must be 1 under {type(self._mirroring).__name__}: in a loop within a "
                    f"function TensorFlow cannot place what replicas do together. Received: {self.steps_per_execution}"
                )
            jit_compile, passes = bool(self.jit_compile), self._compiles_passes and not self.run_eagerly
            forward_and_backward = self._forward_and_backward
            if passes:
                forward_and_backward = tf.function(
                    forward_and_backward, jit_compile=True, reduce_retracing=True, autograph=False
                )
                self.jit_compile = False  # not what Keras makes of it
            self._functions.forward_and_backward = forward_and_backward
            try:
                super().make_train_function(force=True)
            finally:
                self.jit_compile = jit_compile
            made = getattr(self, "train_function")  # noqa: B009 - Keras's, of a type that is not known
            plain = not self.run_eagerly and (passes or not jit_compile) and self.steps_per_execution == 1
            if replicas.spans_processes(self.distribute_strategy):
                made = self.train_function = self._function_of_workers(self.train_step)
            if plain:
                made = self.train_function = train_function(self, made)
        return made

    def make_test_function(self, force: bool = False) -> Callable[[Any], dict[str, Any]]:
        """Returns the function that `evaluate` calls with an iterator, once a step.

        Args:
            force: Whether to make it anew where there is one.
        """
        made: Callable[[Any], dict[str, Any]] | None = getattr(self, "test_function", None)
        if made is not None and not force:
            return made
        if replicas.spans_processes(self.distribute_strategy):
            made = self.test_function = self._function_of_workers(self.test_step)
            return made
        super().make_test_function(force=True)
        return getattr(self, "test_function")  # noqa: B009 - as above

    def _function_of_workers(self, step: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        return function_of_workers(step, self.distribute_strategy, self.run_eagerly)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras's averages the first batch over the replicas, which fails for those of several processes.
        strategy = self._mirroring
        if strategy is not None and iterator is not None:
            for _, _, batches in iterator:
                data_batch = replicas.first_share(strategy, next(batches))
                break
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)

    @property
    def _mirroring(self) -> tf.distribute.Strategy | None:
        return replicas.mirroring(self._distribute_strategy)

    @contextlib.contextmanager
    def window_that(self, ends: bool | None) -> Iterator[None]:
        """For steps that run or are traced within, says whether they end their window; None leaves it to a condition.

        Who says that a step does not end it, and is wrong, leaves a full window open, and `flush` ends it.
        """
        before, self._ends_window = self._ends_window, ends
        try:
            yield
        finally:
            self._ends_window = before

    def _normalizations(self) -> list[AccumBatchNormalization]:
        layers = self._flatten_layers(include_self=False)
        return [layer for layer in layers if isinstance(layer, AccumBatchNormalization)]

    def _adopt(self, layer: AccumBatchNormalization) -> None:
        """Has a layer's windows be those of this model, if they are not yet."""
        if self.optimizer.accumulator.has_member(layer):
            return
        layer.check_window(self.accum_steps, self.micro_batch_size)
        self.optimizer.accumulator.add_member(layer)
        layer.forget_window()

    def _run_step(self, data: Any) -> dict[str, Any]:
        if self.micro_batch_size is not None:
            self._train_on_slices(data, self.micro_batch_size)
        else:
            optimizer = self.optimizer
            ways = {None: optimizer.apply, False: optimizer.accumulate, True: optimizer.close}
            passed = self._pass(data)
            if passed.gradients is not None:
                ways[self._ends_window](passed.gradients, self.trainable_variables, weight=passed.weight)
            self._loss_tracker.update_state(passed.loss, sample_weight=passed.samples)
        return self.get_metrics_result()

    def _train_on_slices(self, data: Any, size: int) -> None:
        """Makes a window of a batch. It is counted, as the losses' mean is, when all micro-batches have run."""
        optimizer = self.optimizer
        if optimizer.accumulator.built:
            optimizer.accumulator.reset()  # what a step that failed may have left open
        # The tracker's dtype may be a half precision, in which sums over many slices are far off.
        wide = "float64" if self._loss_tracker.dtype == "float64" else "float32"
        none = tf.zeros([], wide)
        slices, (total, losses, seen) = fold_slices(
            data,
            size,
            self._train_on_slice,
            [none, none, none],
            static_sizes=bool(self.jit_compile) and not self._compiles_passes,
            at_once=self.parallel_micro_batches,
            empty=self._mirroring is not None,
        )
        if optimizer.accumulator.built and self.trainable_variables:
            optimizer.accumulator._count(slices, tf.cast(total, tf.float32))
            optimizer.close()
        mean = tf.cast(tf.math.divide_no_nan(losses, total), self._loss_tracker.dtype)
        self._loss_tracker.update_state(mean, sample_weight=seen)

    def _train_on_slice(self, data: Any, first: tf.Tensor | bool, carried: Carried) -> Carried:
        total, losses, seen = carried
        passed = self._pass(data)
        if passed.gradients is not None:
            self.optimizer._add_slice(passed.gradients, self.trainable_variables, weight=passed.weight, starts=first)
        weight = tf.cast(passed.weight, total.dtype)
        losses += tf.cast(passed.loss, losses.dtype) * weight
        return total + weight, losses, seen + tf.cast(passed.samples, seen.dtype)

    def _pass(self, data: Any) -> "_Pass":
        if self._mirroring is not None and tf.executing_eagerly() and int(_count_samples(data)) == 0:
            # Keras's losses are no scalars then. A replica without samples has a part in the window all the same.
            return _Pass([tf.zeros_like(each) for each in self.trainable_variables], 0.0, 0.0, 0)
        return self._functions.forward_and_backward(data)

    def _forward_and_backward(self, data: Any) -> "_Pass":
        """Goes over a micro-batch, metrics but that of the loss included."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        samples = _count_samples(x)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            with keras_losses.weighted_by(samples, self):
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        weight = self._window_share(x, y, y_pred, sample_weight, samples)
        if self._mirroring is not None:
            # That of a replica without samples is nothing, whatever it is by the callable.
            weight = tf.where(samples > 0, tf.cast(weight, tf.float32), 0.0)
        variables = self.trainable_variables
        if not variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            return _Pass(None, weight, self._mean_loss(loss, samples), samples)
        return _Pass(tape.gradient(scaled, variables), weight, self._mean_loss(loss, samples), samples)

    @property
    def _compiles_passes(self) -> bool:
        """Whether XLA compiles forward and backward alone, and the fused ops do the rest outside.

        Else it compiles the whole step. Where a step is a micro-batch, the condition that ends a window would be in it,
        of whose branches XLA copies all variables; a loop over micro-batches it is better at, but for convolutions on a
        CPU, which XLA runs on one thread there, and gradients of embeddings, which it makes dense.
        """
        if not self.jit_compile:
            return False
        slow = (keras.layers.Embedding, *(() if tf.config.list_physical_devices("GPU") else _CONVOLUTIONS))
        return self.micro_batch_size is None or any(isinstance(each, slow) for each in self._flatten_layers())

    def _mean_loss(self, loss: tf.Tensor, samples: tf.Tensor) -> tf.Tensor:
        """The mean over a replica's samples: Keras divides losses by the number of replicas."""
        if self._mirroring is None:
            return loss
        return tf.where(samples > 0, loss * self._mirroring.num_replicas_in_sync, tf.zeros_like(loss))

    def _window_share(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, samples: tf.Tensor) -> float | tf.Tensor:
        if callable(self.normalization):
            return tf.cast(self.normalization(x, y, sample_weight), tf.float32)
        if self.normalization == "steps":
            return 1.0
        if self.normalization == "samples":
            return tf.cast(samples, tf.float32)
        return _loss_denominator(self.loss, y_pred, sample_weight, samples)

    def flush(self) -> None:
        """Ends the open window with an update; does nothing where none is open."""
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None or not optimizer.accumulator.built or int(optimizer.accumulator.step) == 0:
            return
        if self._functions.flush is None:
            self._functions.flush = self.optimizer.flush if self.run_eagerly else tf.function(self.optimizer.flush)
        self._functions.flush()

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does; see `partial_window` for what an epoch's end does.

        A window that an interrupted `fit` or `train_on_batch` has left open is dropped at the start, unless
        `partial_window` is `"carry"`.

        Raises:
            ValueError: If `micro_batch_size` is larger than the batch.
        """
        self._check_batch_size(x, batch_size, kwargs.get("steps_per_epoch"))
        # The first of all: a checkpoint is to see what it does.
        own: list[keras.callbacks.Callback] = [_PartialWindow(self.partial_window)]
        if self._epochs is not None:
            own.append(AccumStepsScheduler(dict(self._epochs)))
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = [*own, *keras.tree.flatten(callbacks or [])]
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)
        for callback in own:
            callback.set_model(self)
        callbacks.callbacks[:0] = own
        try:
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)
        finally:
            del callbacks.callbacks[: len(own)]

    def _check_batch_size(self, x: Any, batch_size: int | None, steps_per_epoch: int | None) -> None:
        if isinstance(x, tf.data.Dataset):
            shapes = [getattr(spec, "shape", None) for spec in keras.tree.flatten(x.element_spec)]
            batch_size = next((shape[0] for shape in shapes if shape is not None and shape.rank), None)
        elif (
            batch_size is None
            and steps_per_epoch is None
            and isinstance(x, np.ndarray | tf.Tensor | dict | list | tuple)
        ):
            batch_size = 32  # what Keras makes of arrays
        if self.micro_batch_size is None or batch_size is None:
            return
        replicas = 1 if self._mirroring is None else self._mirroring.num_replicas_in_sync
        share = -(-batch_size // replicas)
        if self.micro_batch_size > share:
            of = "the batch size" if replicas == 1 else f"what each of {replicas} replicas gets of {batch_size} samples"
            raise ValueError(
                f"A batch is split into micro-batches: micro_batch_size={self.micro_batch_size} is larger than {of}, "
                f"{share}."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this model again, without its weights."""
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            "accum_steps": keras.saving.serialize_keras_object(
                self.accum_steps if self._epochs is None else {str(epoch): steps for epoch, steps in self._epochs}
            ),
            "micro_batch_size": self.micro_batch_size,
            "parallel_micro_batches": self.parallel_micro_batches,
            "normalization": keras.saving.serialize_keras_object(self.normalization),
            "partial_window": self.partial_window,
            "gradient_clipping": keras.saving.serialize_keras_object(self.gradient_clipping),
            "lazy_sparse": self.lazy_sparse,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Makes a model from what `get_config` returned."""
        config = dict(config)
        for key in ("model", "accum_steps", "normalization", "gradient_clipping"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        if isinstance(config["accum_steps"], dict):
            config["accum_steps"] = {int(epoch): steps for epoch, steps in config["accum_steps"].items()}
        return cls(**config)

    def __repr__(self) -> str:
        sliced = self.micro_batch_size is not None
        window = f"micro_batch_size={self.micro_batch_size}" if sliced else f"accum_steps={self.accum_steps}"
        return f"<GradientAccumulateModel {self.model.name}, {window}>"


class _PartialWindow(PartialWindow):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        strategy = self.model.distribute_strategy
        if replicas.spans_processes(strategy) and self.model.optimizer.accumulator.built:
            # Each has restored what it found.
            updates = int(self.model.optimizer.iterations.numpy())
            step = int(self.model.optimizer.accumulator.step)
            numbers = {"epoch": epoch, "updates": updates, "micro-batches in the window": step}
            replicas.check_agreement(strategy, numbers)

    def _flush(self) -> None:
        self.model.flush()

    def _drop(self) -> None:
        super()._drop()
        if not self.model.optimizer.accumulator.built:
            for layer in self.model._normalizations():  # which may have loaded an open one
                layer.drop_window()


def _count_samples(x: Any) -> tf.Tensor:
    return tf.shape(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))[0]


def _loss_denominator(loss: Any, y_pred: Any, sample_weight: Any, samples: tf.Tensor) -> tf.Tensor:
    """What the loss's mean divides by."""
    outputs = keras.tree.flatten(y_pred)
    if len(outputs) != 1:
        raise ValueError(
            "normalization='weights' needs a model with one output, whose loss has one denominator. Received: "
            f"{len(outputs)} outputs. Use normalization='samples' or a callable."
        )
    mask = getattr(outputs[0], "_keras_mask", None)
    share = None if mask is None else tf.cast(mask, tf.float32)
    if (
        _reduction(next(iter(keras.tree.flatten(loss)), None)) == "mean_with_sample_weight"
        and sample_weight is not None
    ):
        weights = tf.cast(keras.tree.flatten(sample_weight)[0], tf.float32)
        if share is None:
            share = weights
        else:
            missing = share.shape.rank - weights.shape.rank
            share *= tf.reshape(weights, tf.concat([tf.shape(weights), [1] * missing], axis=0))
    return tf.cast(samples, tf.float32) if share is None else tf.reduce_sum(share)


def _reduction(loss: Any) -> str:
    return getattr(loss, "reduction", "sum_over_batch_size")


def _check_losses(loss: Any, normalization: str | Weighting) -> None:
    for each in keras.tree.flatten(loss):
        reduction = _reduction(each)
        if reduction in (None, "none", "sum"):
            raise ValueError(
                f"The reduction of the loss '{each.name}' must be a mean, such as 'sum_over_batch_size': the window's "
                f"gradient is a weighted mean over its micro-batches. Received: {reduction!r}"
            )
        if reduction == "mean_with_sample_weight" and normalization in ("samples", "steps"):
            raise ValueError(
                f"The loss '{each.name}' divides by the sum of sample weights: make the model with "
                f"normalization='weights', or a callable. Received: {normalization!r}"
            )


def _check_model(model: keras.Model | None, inputs: Any, outputs: Any) -> keras.Model:
    if model is None:
        if inputs is None or outputs is None:
            raise ValueError("Give either a model, or both `inputs` and `outputs`.")
        return keras.Model(inputs=inputs, outputs=outputs)
    if inputs is not None or outputs is not None:
        raise ValueError("Give either a model, or `inputs` and `outputs`, not both.")
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    for method in ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics"):
        if getattr(type(model), method) is not getattr(keras.Model, method):
            raise ValueError(
                f"{type(model).__name__} has a `{method}` of its own, which would not be called. Compile it with a "
                "GradientAccumulateOptimizer instead."
            )
    if model._metrics:
        raise ValueError(
            f"{type(model).__name__} has metrics of its own, which would not be reset. Give them to `compile`, or have "
            "a GradientAccumulateOptimizer in its own `compile` instead."
        )
    return model


def _check_mode(
    accum_steps: int | dict[int, int] | Schedule | None, micro_batch_size: int | None, parallel_micro_batches: int
) -> None:
    if (accum_steps is None) == (micro_batch_size is None):
        raise ValueError(
            "Give exactly one of `accum_steps` and `micro_batch_size`. "
            f"Received: accum_steps={accum_steps}, micro_batch_size={micro_batch_size}"
        )
    if isinstance(accum_steps, dict):
        AccumStepsScheduler(accum_steps)
    _check_count("parallel_micro_batches", parallel_micro_batches, "a number of micro-batches")
    if micro_batch_size is not None:
        _check_count("micro_batch_size", micro_batch_size, "a number of samples")
    elif parallel_micro_batches != 1:
        raise ValueError(
            "`parallel_micro_batches` needs `micro_batch_size`: with `accum_steps` each step is one micro-batch. "
            f"Received: {parallel_micro_batches}"
        )


def _check_count(name: str, value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, {what}. Received: {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {value}")
