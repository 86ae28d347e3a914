"""A model that trains with windows of micro-batches: batch by batch in `fit`, or split from each batch in its step.

accum_steps=K           a `fit` step is one micro-batch; every K-th ends a window with an update
micro_batch_size=b      a `fit` step is a window: its batch is split into micro-batches of b samples, and one update
                        is made. To `fit`, its callbacks, schedules and metrics this is large-batch training.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import layers_within
from accumops.adapters.untracked import Untracked
from accumops.arguments import Schedule, check_accum_steps, check_count
from accumops.normalization.layer import AccumBatchNormalization
from accumops.normalization.layer_calls import owning_windows
from accumops.normalization.layer_window import LayerWindow
from accumops.optimizer.ending import Clipping
from accumops.optimizer.optimizer import GradientAccumulateOptimizer
from accumops.planning.micro_batch_plan import MicroBatchPlan
from accumops.renamed import explains_renamed
from accumops.training import checks
from accumops.training.auto_micro_batch import AutoMicroBatch
from accumops.training.callbacks import AccumStepsScheduler
from accumops.training.loss_check import LossCheck
from accumops.training.model_config import ConfiguredWrapper
from accumops.training.partial_window import PartialWindowOfModel
from accumops.training.step import TrainingStep
from accumops.training.train_function import function_of_workers, train_function
from accumops.training.weighting import Normalization, check_losses
from accumops.training.xla_compilation import compiles_passes
from accumops.window import replicas


@keras.saving.register_keras_serializable(package="accumops")
class GradientAccumulateModel(ConfiguredWrapper):
    """Trains a model with windows of micro-batches: each window makes one update, as the large batch would.

    Give it the model, or the `inputs` and `outputs` of one. The wrapped model keeps its layers and weights: predict
    with either, and save `model.model` to have it without accumops. Around a functional or Sequential model this is a
    functional model with the same `inputs`, `outputs` and `layers`; layers of a subclassed model are those of
    `model.model`. Exactly one of `accum_steps` and `micro_batch_size` says how a window is run:

    - `accum_steps=K`: each batch of `fit` is a micro-batch, and every K-th makes an update.
    - `micro_batch_size=b`: each batch of `fit` is a window. The step splits it into micro-batches of b samples, which
      run one after another, so that activations take the memory of one. A last batch of any size is exact. Batch size,
      steps, schedules, callbacks and metrics are those of training with the large batch.

    A layer that looks at a whole batch, such as batch normalization, sees micro-batches, unless
    `replace_batchnorm_layers(model, statistics="window")` has it see the window. A loss of `add_loss` that is a
    sum over the batch, and not a mean, is averaged over the window's micro-batches.

    Under `tf.distribute` (MirroredStrategy, MultiWorkerMirroredStrategy) create and compile it within
    `strategy.scope()`. A batch of `fit` is split over the replicas; with `micro_batch_size` each replica splits its
    part again. Replicas communicate once, where a window ends. The update is that of one device with all samples,
    however many each replica got.

    Args:
        model: The `keras.Model` to train, with no `train_step` of its own.
        accum_steps: Micro-batches a window: an int of at least 1; or a dict from epochs, counted from 0, to the number
            from this epoch on; or a callable that returns it for the count of updates so far, an int64 scalar. A new
            number, also one that the attribute is set to, holds from the next window on.
        micro_batch_size: Samples a micro-batch, an int of at least 1. Or `"auto"`: the first step of `fit` finds the
            micro-batch that is fastest within `memory_limit`, and whether to recompute (`find_micro_batch_size`), says
            so in one line, and keeps it for later runs. If memory runs out all the same, the micro-batch is halved, and
            the same step is made again.
        memory_limit: With `micro_batch_size="auto"`, the most memory that training may take, in bytes or as `"4GB"`; by
            default what the device has.
        parallel_micro_batches: With `micro_batch_size`, how many micro-batches TensorFlow may run side by side. Their
            activations are in memory together. Gradients and metrics add up in the same order.
        whole_inputs: With `micro_batch_size`, inputs that are no batch, such as the adjacency of a graph: each
            micro-batch gets them whole. Keys if the inputs are a dict, else positions.
        loss_over: With `micro_batch_size`, what the loss sees: `"micro_batch"` (each micro-batch by itself, which is
            exact for means and sums over samples) or `"window"` (the outputs of all its micro-batches at once, which
            is exact for every loss, such as contrastive ones; it costs one more forward pass).
        check_loss: What becomes of a loss that micro-batches cannot compute, such as a contrastive one: `"error"` (a
            ValueError before the first training step), `"warn"`, or False for no check. See `docs/loss_check.md`.
        normalization: What a micro-batch counts for in the mean over its window: `"auto"` (what its loss has divided
            by: samples, valid positions of a mask, labels that `ignore_class` leaves, or the sum of sample weights if
            the loss's reduction is `"mean_with_sample_weight"`; an error if the losses of several outputs divide by
            different numbers), `"weights"` (the same, for one output), `"samples"` (its number of samples), `"steps"`
            (all count the same) or a callable `(x, y, sample_weight) -> scalar`.
        partial_window: What becomes of a window that an epoch's end leaves open, with `accum_steps`: `"flush"` (an
            update, correctly weighted), `"carry"` (it goes on in the next epoch) or `"drop"` (no update).
        gradient_clipping: As for `GradientAccumulateOptimizer`.
        lazy_sparse: As for `GradientAccumulateOptimizer`.
        nonfinite: As for `GradientAccumulateOptimizer`. A skipped micro-batch leaves no trace in running statistics,
            metrics and the mean of the loss; with `"drop"`, one whose loss is not finite. `fit` logs `nonfinite_count`.
        inputs: The inputs of a functional model, instead of `model`.
        outputs: Its outputs.
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

    @explains_renamed
    def __init__(
        self,
        model: keras.Model | None = None,
        *,
        accum_steps: int | dict[int, int] | Schedule | None = None,
        micro_batch_size: int | str | None = None,
        memory_limit: str | int | None = None,
        parallel_micro_batches: int = 1,
        whole_inputs: Sequence[str | int] = (),
        loss_over: str = "micro_batch",
        normalization: str | Normalization = "auto",
        partial_window: str = "flush",
        gradient_clipping: Clipping | None = None,
        lazy_sparse: bool = False,
        check_loss: str | bool = "error",
        nonfinite: str = "propagate",
        inputs: Any = None,
        outputs: Any = None,
        name: str | None = None,
    ) -> None:
        model = checks.check_model(model, inputs, outputs)
        checks.check_mode(accum_steps, micro_batch_size, parallel_micro_batches, whole_inputs)
        checks.check_auto(micro_batch_size, memory_limit, parallel_micro_batches, loss_over)
        checks.check_settings(normalization, partial_window, gradient_clipping, lazy_sparse, nonfinite, check_loss)
        checks.check_loss_over(loss_over, micro_batch_size, parallel_micro_batches, normalization, nonfinite)
        super().__init__(model, name)
        # A tuple: Keras and TensorFlow would track a dict, and refuse to save one whose keys are ints.
        self._epochs = tuple(accum_steps.items()) if isinstance(accum_steps, dict) else None
        self._accum_steps = accum_steps[0] if isinstance(accum_steps, dict) else check_accum_steps(accum_steps)
        self._micro_batch_size = micro_batch_size if micro_batch_size in (None, "auto") else int(micro_batch_size)
        self.finds_micro_batch = micro_batch_size == "auto"
        self.memory_limit = memory_limit
        self.parallel_micro_batches = int(parallel_micro_batches)
        self.whole_inputs = tuple(whole_inputs)
        self.loss_over = loss_over
        self.normalization = normalization
        self.partial_window = partial_window
        self.gradient_clipping = gradient_clipping
        self.lazy_sparse = lazy_sparse
        self.check_loss = check_loss
        self.nonfinite = nonfinite
        # Untracked, where TensorFlow does not find functions to export.
        self._untracked = Untracked(step=TrainingStep(self), check=None, flush=None, ends_window=None)
        self._untracked.check = LossCheck(self, self._untracked.step.whole_inputs)
        self._untracked.auto = AutoMicroBatch(self, memory_limit) if self.finds_micro_batch else None

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
            change = f"{accum_steps!r} instead of {self.accum_steps!r}"
            raise ValueError(f"`accum_steps` can be changed from one int to another. Received: {change}")
        self._accum_steps = int(accum_steps)
        if getattr(self, "optimizer", None) is not None:
            self.optimizer.accum_steps = self._accum_steps

    @property
    def micro_batch_size(self) -> int | str | None:
        """Samples a micro-batch, or None with `accum_steps`; `"auto"` until it is found. It can be set to an int."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, micro_batch_size: int) -> None:
        if self._micro_batch_size is None:
            raise ValueError(f"`micro_batch_size` cannot be set with accum_steps={self.accum_steps}.")
        check_count("micro_batch_size", micro_batch_size, "a number of samples")
        self._micro_batch_size = int(micro_batch_size)
        self._untracked.step.compile_passes(self._untracked.step.compiled_pass is not None)
        if self._untracked.auto is None:
            self.train_function = None
        else:
            self._untracked.auto.start_anew()

    @property
    def micro_batch_plan(self) -> MicroBatchPlan | None:
        """What was found with `micro_batch_size="auto"`; None before."""
        return None if self._untracked.auto is None else self._untracked.auto.plan

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
            optimizer: The optimizer that makes one update a window. It is wrapped in a `GradientAccumulateOptimizer`.
                This model's own, from an earlier `compile`, keeps its state, and so does one with the same
                `accum_steps`, which is not wrapped twice.
            loss: The loss, or one for each output. Their reductions have to be means, or all of them `"sum"`: then a
                window makes the update of the large batch's sum.
            loss_weights: As for `keras.Model.compile`.
            metrics: As for `keras.Model.compile`. With `micro_batch_size` a function that returns one value for a batch
                must be a mean over samples: the maximum or median of a batch cannot be had from its micro-batches.
            weighted_metrics: Metrics that sample weights apply to.
            run_eagerly: Whether nothing is traced.
            steps_per_execution: How many steps one call makes. Small models train faster with several.
            jit_compile: Whether XLA compiles steps.
            auto_scale_loss: Whether a `mixed_float16` model gets a `LossScaleOptimizer` inside that wrapper. It drops
                windows that are not finite, and its scale backs off. Keras's SwapEMAWeights does not look through it.

        Raises:
            ValueError: If the optimizer accumulates gradients itself, a loss has a reduction that no weighted mean of
                micro-batches gives, or with `micro_batch_size` if a layer is stateful.
        """
        reduction = "mean" if self.loss_over == "window" else check_losses(loss, self.normalization)
        checks.check_layers(self.model, self._accum_steps, self.micro_batch_size)
        optimizer = keras.optimizers.get(optimizer)
        own = optimizer is getattr(self, "optimizer", None)
        if isinstance(optimizer, GradientAccumulateOptimizer) and (own or optimizer.accum_steps == self._accum_steps):
            optimizer = optimizer.inner_optimizer  # an .h5 file has an equal one
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if auto_scale_loss and self.model.dtype_policy.name == "mixed_float16" and not scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        if isinstance(self.accum_steps, int):
            self._accum_steps = self.accum_steps  # a callback may have changed the optimizer's
        wrapped = GradientAccumulateOptimizer(
            optimizer,
            self._accum_steps,
            gradient_clipping=self.gradient_clipping,
            lazy_sparse=self.lazy_sparse,
            reduction=reduction,
            nonfinite=self.nonfinite,
        )
        wrapped.accumulator.state.members.added_by_model = True
        before = getattr(self, "optimizer", None)
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
        checks.check_compilation(self.mirroring, self.jit_compile)
        wrapped.jit_compile = bool(self.jit_compile) and not self.compiles_passes
        if before is not None:
            before.accumulator.state.members.release()
        for layer in self.normalizations():
            self._adopt(layer)
        self._untracked.step.start_anew()
        self._untracked.check.restart()
        self._untracked.flush = None

    # As in Keras's `fit`: AutoGraph would look at all that a step calls.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, Any]:
        """Runs one micro-batch, or with `micro_batch_size` one window.

        Args:
            data: A batch, as `fit` gives it.

        Returns:
            The metrics, by name.
        """
        if self.model.built and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        with self.owning_windows():
            self._untracked.step.train(data, self._untracked.ends_window)
        return self.get_metrics_result()

    def owning_windows(self) -> AbstractContextManager[None]:
        """Has the windows of layers that are called in a block follow the windows of this model."""
        return owning_windows(self._adopt)

    @property
    def training_step(self) -> TrainingStep:
        """The parts of `train_step`."""
        step: TrainingStep = self._untracked.step
        return step

    @tf.autograph.experimental.do_not_convert
    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates a batch, as `evaluate` gives it, and returns the metrics by name."""
        return self._untracked.step.evaluate(data)

    def make_train_function(self, force: bool = False) -> Callable[[Any], dict[str, Any]]:
        """Returns the function that `fit` calls with an iterator, once a step.

        Args:
            force: Whether to make it anew if there is one.
        """
        made: Callable[[Any], dict[str, Any]] | None = getattr(self, "train_function", None)
        if made is None or force:
            checks.check_steps_per_execution(self.mirroring, self.steps_per_execution, self.finds_micro_batch)
            for layer in self.normalizations():  # those that were made since `compile`
                self._adopt(layer)
            self._untracked.flush = None
            jit_compile, passes = bool(self.jit_compile), self.compiles_passes and not self.run_eagerly
            self._untracked.step.compile_passes(passes)
            if passes:
                self.jit_compile = False  # for the function that Keras makes around the passes
            try:
                super().make_train_function(force=True)
            finally:
                self.jit_compile = jit_compile
            made = getattr(self, "train_function")  # noqa: B009 - Keras's, of a type that is not known
            # A subclass's `train_step` may return other logs than the metrics after the last step.
            own_step = getattr(self.train_step, "__func__", None) is GradientAccumulateModel.train_step
            plain = not self.run_eagerly and (passes or not jit_compile) and (own_step or self.steps_per_execution == 1)
            if replicas.spans_processes(self.distribute_strategy):
                made = function_of_workers(self.train_step, self.distribute_strategy, self.run_eagerly)
            if plain:
                made = train_function(self, made)
            check, auto = self._untracked.check, self._untracked.auto
            made = self.train_function = check.before(made) if auto is None else auto.train_function(check.before)
        return made

    def make_test_function(self, force: bool = False) -> Callable[[Any], dict[str, Any]]:
        """Returns the function that `evaluate` calls with an iterator, once a step.

        Args:
            force: Whether to make it anew if there is one.
        """
        made: Callable[[Any], dict[str, Any]] | None = getattr(self, "test_function", None)
        if made is not None and not force:
            return made
        if replicas.spans_processes(self.distribute_strategy):
            made = self.test_function = function_of_workers(self.test_step, self.distribute_strategy, self.run_eagerly)
            return made
        super().make_test_function(force=True)
        return getattr(self, "test_function")  # noqa: B009 - as above

    def batch_to_build_with(self, iterator: Any, data_batch: Any) -> tuple[Any, Any]:
        """Has Keras build the model with the first replica's part of a batch, under a strategy.

        Keras would take the mean of a batch over the replicas, which fails for replicas of several processes.
        """
        strategy = self.mirroring
        if strategy is None or iterator is None:
            return iterator, data_batch
        for _, _, batches in iterator:
            data_batch = replicas.first_share(strategy, next(batches))
            self._untracked.check.remember(data_batch)
            break
        return None, data_batch

    @property
    def mirroring(self) -> tf.distribute.Strategy | None:
        """The mirroring strategy that the model was created under, or None."""
        return replicas.mirroring(self.distribute_strategy)

    @property
    def compiles_passes(self) -> bool:
        """Whether XLA compiles forward and backward alone, and not the whole step."""
        return self.loss_over != "window" and compiles_passes(self, loops=self.micro_batch_size is not None)

    @contextlib.contextmanager
    def window_ends(self, ends: bool | None) -> Iterator[None]:
        """Says whether the steps that run or are traced in a block end their window.

        Args:
            ends: True or False; None leaves it to the counters. If it is False and the window becomes full, the window
                stays open until `flush` ends it.
        """
        before, self._untracked.ends_window = self._untracked.ends_window, ends
        try:
            yield
        finally:
            self._untracked.ends_window = before

    def normalizations(self) -> list[AccumBatchNormalization]:
        """The model's layers that follow its windows."""
        layers = layers_within(self, include_self=False)
        return [layer for layer in layers if isinstance(layer, AccumBatchNormalization)]

    def _adopt(self, layer: AccumBatchNormalization) -> LayerWindow:
        """Returns a layer's window that ends with those of this model."""
        state = self.optimizer.accumulator.state
        if state.members.window_of(layer) is None:
            layer.check_window(self.accum_steps, self.micro_batch_size)
        return layer.window_of_model(state, self.name)

    def flush(self) -> None:
        """Ends the open window with an update. Does nothing if none is open."""
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None or not optimizer.accumulator.built or int(optimizer.accumulator.step) == 0:
            return
        if self._untracked.flush is None:
            self._untracked.flush = self.optimizer.flush if self.run_eagerly else tf.function(self.optimizer.flush)
        self._untracked.flush()

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
        """Trains as `keras.Model.fit` does. `partial_window` says what becomes of a window at an epoch's end.

        A window that an interrupted `fit` or `train_on_batch` has left open is dropped at the start, unless
        `partial_window` is `"carry"`.

        Raises:
            ValueError: If `micro_batch_size` is larger than the batch, or micro-batches cannot compute the loss.
        """
        size = None if self.finds_micro_batch else self.micro_batch_size
        checks.check_batch_size(size, x, batch_size, kwargs.get("steps_per_epoch"), self.mirroring)
        # The first of all callbacks, so that a checkpoint sees the settled window.
        own: list[keras.callbacks.Callback] = [PartialWindowOfModel(self.partial_window)]
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

    def __repr__(self) -> str:
        mode = "accum_steps" if self.micro_batch_size is None else "micro_batch_size"
        return f"<GradientAccumulateModel {self.model.name}, {mode}={getattr(self, mode)}>"


# In an .h5 file Keras names the class of a model without its package.
keras.saving.get_custom_objects()["GradientAccumulateModel"] = GradientAccumulateModel
