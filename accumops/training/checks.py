"""Models and arguments that a `GradientAccumulateModel` refuses, and the errors that say why."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from accumops.adapters.keras_layer import layers_within
from accumops.adapters.keras_model import own_metrics
from accumops.arguments import Schedule, check_bool, check_count, check_nonfinite
from accumops.optimizer.checks import check_gradient_clipping
from accumops.sizes import bytes_from
from accumops.training.callbacks import AccumStepsScheduler
from accumops.training.partial_window import check_policy
from accumops.training.weighting import Normalization, check_normalization


def check_model(model: keras.Model | None, inputs: Any, outputs: Any) -> keras.Model:
    """Returns the model to wrap, made of `inputs` and `outputs` if these are given instead."""
    if model is None:
        if inputs is None or outputs is None:
            raise ValueError("Give either a model, or both `inputs` and `outputs`.")
        return keras.Model(inputs=inputs, outputs=outputs)
    if not isinstance(model, keras.Model):
        hint = f" Write `accum_steps={model}`." if isinstance(model, int) else ""
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}.{hint}")
    if inputs is not None or outputs is not None:
        raise ValueError("Give either a model, or `inputs` and `outputs`, not both.")
    for method in (*_STEPS, *_LOOPS):
        if getattr(type(model), method) is getattr(keras.Model, method):
            continue
        preprocesses = method in _LOOPS and _preprocesses(model, method)
        if preprocesses and model.preprocessor is None:
            continue
        remedy = " Or set its `preprocessor` to None, and preprocess the data before `fit`." if preprocesses else ""
        raise ValueError(
            f"{type(model).__name__} has a `{method}` of its own, which would not be called. Compile it with a "
            f"GradientAccumulateOptimizer instead.{remedy}"
        )
    if own_metrics(model):
        raise ValueError(
            f"{type(model).__name__} has metrics of its own, which would not be reset. Give them to `compile`, or have "
            "a GradientAccumulateOptimizer in its own `compile` instead."
        )
    return model


_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_LOOPS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


def _preprocesses(model: keras.Model, method: str) -> bool:
    """Whether a keras-hub task overrides a method only to run its preprocessor before Keras's own method."""
    owner = next(each for each in type(model).__mro__ if method in vars(each))
    return "preprocess_samples" in vars(owner) and hasattr(model, "preprocessor")


def check_settings(
    normalization: str | Normalization,
    partial_window: str,
    gradient_clipping: Callable[..., object] | None,
    lazy_sparse: bool,
    nonfinite: str,
    check_loss: str | bool,
) -> None:
    """Raises if an argument of a `GradientAccumulateModel` is none of its values, in both of its modes."""
    check_normalization(normalization)
    check_policy(partial_window)
    check_gradient_clipping(gradient_clipping)
    check_bool("lazy_sparse", lazy_sparse)
    check_nonfinite(nonfinite)
    if check_loss is not False and check_loss not in ("error", "warn"):
        raise ValueError(f"`check_loss` must be one of ('error', 'warn', False). Received: {check_loss!r}")


def check_mode(
    accum_steps: int | dict[int, int] | Schedule | None,
    micro_batch_size: int | str | None,
    parallel_micro_batches: int,
    whole_inputs: Sequence[str | int],
) -> None:
    """Raises unless exactly one mode is chosen, with numbers that fit it."""
    if (accum_steps is None) == (micro_batch_size is None):
        raise ValueError(
            "Give exactly one of `accum_steps` and `micro_batch_size`. "
            f"Received: accum_steps={accum_steps}, micro_batch_size={micro_batch_size}"
        )
    if isinstance(accum_steps, dict):
        AccumStepsScheduler(accum_steps)
    check_count("parallel_micro_batches", parallel_micro_batches, "a number of micro-batches")
    if isinstance(whole_inputs, str) or not all(isinstance(key, str | int) for key in whole_inputs):
        raise TypeError(f"`whole_inputs` must be a list of keys or positions of inputs. Received: {whole_inputs!r}")
    if micro_batch_size is None and whole_inputs:
        raise ValueError(
            "`whole_inputs` needs `micro_batch_size`: with `accum_steps` each step gets its inputs as they are. "
            f"Received: {whole_inputs!r}"
        )
    if micro_batch_size is not None:
        given: Any = micro_batch_size
        if given != "auto":
            check_count("micro_batch_size", given, 'a number of samples, or "auto"')
    elif parallel_micro_batches != 1:
        raise ValueError(
            "`parallel_micro_batches` needs `micro_batch_size`: with `accum_steps` each step is one micro-batch. "
            f"Received: {parallel_micro_batches}"
        )


def check_auto(
    micro_batch_size: int | str | None, memory_limit: str | int | None, parallel_micro_batches: int, loss_over: str
) -> None:
    """Raises if arguments do not go with finding a micro-batch, or are for it alone."""
    if micro_batch_size != "auto":
        if memory_limit is not None:
            raise ValueError(
                f"`memory_limit` needs micro_batch_size='auto'. Received: {memory_limit!r} with "
                f"micro_batch_size={micro_batch_size}"
            )
        return
    if memory_limit is not None:
        bytes_from("memory_limit", memory_limit)
    if parallel_micro_batches != 1 or loss_over == "window":
        given = "loss_over='window'" if loss_over == "window" else f"parallel_micro_batches={parallel_micro_batches}"
        raise ValueError(
            "micro_batch_size='auto' measures micro-batches that run one at a time, each with its own loss. With "
            f"{given} give a number."
        )


def check_loss_over(
    loss_over: str, micro_batch_size: int | str | None, parallel_micro_batches: int, normalization: Any, nonfinite: str
) -> None:
    """Raises unless `loss_over` is known and goes with the other arguments."""
    if loss_over not in ("micro_batch", "window"):
        raise ValueError(f"`loss_over` must be 'micro_batch' or 'window'. Received: {loss_over!r}")
    if loss_over == "micro_batch":
        return
    if micro_batch_size is None:
        raise ValueError(
            "loss_over='window' needs `micro_batch_size`: with `accum_steps` a step of `fit` has one micro-batch, and "
            "the others of its window are not there."
        )
    if parallel_micro_batches != 1:
        raise ValueError(
            "loss_over='window' runs one micro-batch at a time: leave `parallel_micro_batches` out. "
            f"Received: {parallel_micro_batches}"
        )
    if normalization != "auto":
        raise ValueError(
            "loss_over='window' computes the loss once, so micro-batches have no weights: leave `normalization` out. "
            f"Received: {normalization!r}"
        )
    if nonfinite == "skip":
        raise ValueError(
            "loss_over='window' computes one loss, so a micro-batch cannot be left out of it by its gradients: use "
            "nonfinite='drop', which leaves out the window."
        )


def check_compilation(strategy: tf.distribute.Strategy | None, jit_compile: bool) -> None:
    """Raises if XLA is to compile steps under a mirroring strategy."""
    if strategy is not None and jit_compile:
        raise ValueError(
            f"`jit_compile=True` does not work under {type(strategy).__name__}: what replicas do together at a "
            "window's end is not compiled by XLA. Leave it out."
        )


def check_steps_per_execution(
    strategy: tf.distribute.Strategy | None, steps_per_execution: int, finds_micro_batch: bool
) -> None:
    """Raises if several steps are to run in one call where that cannot be."""
    if finds_micro_batch and strategy is not None:
        raise ValueError(
            f"micro_batch_size='auto' finds a micro-batch for one device. Under {type(strategy).__name__} give a "
            "number: `accumops.find_micro_batch_size` finds it without a strategy, for the part of the batch that a "
            "replica gets."
        )
    if finds_micro_batch and steps_per_execution > 1:
        raise ValueError(
            "`steps_per_execution` must be 1 with micro_batch_size='auto', which makes a step again where memory runs "
            f"out. Received: {steps_per_execution}"
        )
    if strategy is not None and steps_per_execution > 1:
        raise ValueError(
            f"`steps_per_execution` must be 1 under {type(strategy).__name__}: in a loop within a function TensorFlow "
            f"cannot place what replicas do together. Received: {steps_per_execution}"
        )


def check_layers(model: keras.Model, accum_steps: Any, micro_batch_size: int | str | None) -> None:
    """Raises for layers that micro-batches of one batch would mix up, and warns of layers whose state moves too often.

    Args:
        model: The model.
        accum_steps: Micro-batches a window, if each batch is a micro-batch.
        micro_batch_size: Samples a micro-batch, if batches are split.

    Raises:
        ValueError: If batches are split and a layer is stateful: it would hand the state of one sample to another.
    """
    layers = layers_within(model, include_self=False)
    stateful = [layer.name for layer in layers if getattr(layer, "stateful", False)]
    if stateful and micro_batch_size is not None:
        raise ValueError(
            f"Stateful layers cannot be trained with `micro_batch_size`: {_some(stateful)}. The samples of a "
            "micro-batch would go on from the state of other samples. Use `accum_steps`, with batches of the size that "
            "the layers are made for."
        )
    moving = [layer for layer in layers if layer.trainable and type(layer) in _MOVED_BY_EACH_CALL]
    if moving and accum_steps != 1:
        remedies = dict.fromkeys(_MOVED_BY_EACH_CALL[type(layer)] for layer in moving)
        warnings.warn(
            "Layers whose state moves with each micro-batch, and not once a window as with the large batch: "
            f"{_some([layer.name for layer in moving])}. {' '.join(remedies)}",
            stacklevel=3,
        )


_MOVED_BY_EACH_CALL: dict[type[keras.Layer], str] = {
    keras.layers.BatchNormalization: (
        "accumops.replace_batchnorm_layers(model) gives batch normalization whose statistics move once a window."
    ),
    keras.layers.SpectralNormalization: (
        "Spectral normalization runs its power iterations in each micro-batch, and so estimates the norm better than "
        "with the large batch; nothing else changes."
    ),
}


def _some(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_batch_size(
    micro_batch_size: Any,
    x: Any,
    batch_size: int | None,
    steps_per_epoch: int | None,
    strategy: tf.distribute.Strategy | None,
) -> None:
    """Raises if micro-batches are larger than the batches that `fit` will split, where these are known.

    Args:
        micro_batch_size: Samples a micro-batch, or None if batches are not split.
        x: The data given to `fit`.
        batch_size: The batch size given to `fit`.
        steps_per_epoch: The steps given to `fit`.
        strategy: The strategy whose replicas split the batch first, or None.
    """
    if isinstance(x, tf.data.Dataset):
        shapes = [getattr(spec, "shape", None) for spec in keras.tree.flatten(x.element_spec)]
        batch_size = next((shape[0] for shape in shapes if shape is not None and shape.rank), None)
    elif batch_size is None and steps_per_epoch is None and isinstance(x, np.ndarray | tf.Tensor | dict | list | tuple):
        batch_size = 32  # Keras's default for arrays
    if micro_batch_size is None or batch_size is None:
        return
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    share = -(-batch_size // replicas)
    if micro_batch_size > share:
        of = "the batch size" if replicas == 1 else f"what each of {replicas} replicas gets of {batch_size} samples"
        raise ValueError(
            f"A batch is split into micro-batches: micro_batch_size={micro_batch_size} is larger than {of}, {share}."
        )
