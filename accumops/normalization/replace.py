"""Batch normalization of a whole model, replaced by that of accumops, and back."""

import keras

from accumops.arguments import check_statistics, check_window_memory
from accumops.normalization.layer import AccumBatchNormalization
from accumops.normalization.rebuild import Rebuilder
from accumops.renamed import explains_renamed


@explains_renamed
def replace_batchnorm_layers(
    model: keras.Model,
    accum_steps: int | None = None,
    *,
    statistics: str = "micro_batch",
    every: int | None = None,
    memory: str | int | None = None,
) -> keras.Model:
    """Returns a copy of a model in which every `keras.layers.BatchNormalization` is an `AccumBatchNormalization`.

    The new layers have the configuration, the name and the weights of those that they replace. Everything else is as in
    the model: other layers are new ones of the same name and configuration, with the same weights, seeds, vocabularies
    and `trainable` flags. Layers and nested models that are used several times stay one. No variable is shared with the
    model, which is left as it is.

    Layers of exactly that class are replaced, also in nested models and in layers whose config holds other layers, such
    as `keras.layers.TimeDistributed`; subclasses are kept. Layers of your own need a config, as for saving. A
    `keras.layers.Lambda` and its copy share what the function takes from its surroundings.

    The new model is not compiled: compile it, and wrap it in a `GradientAccumulateModel`, afterwards. A functional
    model of your own class is made by that class if its constructor takes `inputs` and `outputs`; otherwise the new one
    is a plain functional model. Files of `save_weights` name layers by their class, so the files of one model do not
    fit the other.

    By default a micro-batch is normalized by its own moments, and only the running statistics are those of the window.
    With `statistics="window"` it is normalized by the moments of the whole window, and the update is that of the large
    batch: wrap the new model in a `GradientAccumulateModel` with `micro_batch_size`. The window then runs layer by
    layer, and activations are computed again, as `every` or `memory` says.

    Args:
        model: A functional or Sequential `keras.Model`.
        accum_steps: The new layers' `accum_steps`.
        statistics: `"micro_batch"` or `"window"`: what a micro-batch is normalized by.
        every: With `"window"`, how many of the layers there are from one tensor that the window keeps to the next; by
            default 2. The more, the less is kept and the more is computed again.
        memory: With `"window"` in place of `every`, the most memory that a window may take, in bytes or as `"4GB"`:
            weights, a batch, what the window keeps and the gradient's work, without the slots of an optimizer, the
            accumulators, and workspaces of libraries. As little as possible is computed again for it.

    Returns:
        The new model.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument has another type.
        ValueError: If `model` is a subclassed model or a `GradientAccumulateModel`, a layer makes its batch
            normalization in its own code or cannot be made again from its config, or an argument has a value that it
            cannot have. In training, if no window keeps to `memory`; the message has the smallest goal that is kept.

    Example:

    >>> net = keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=10)
    >>> net = accumops.replace_batchnorm_layers(net)
    >>> net.get_layer("bn_Conv1")
    <AccumBatchNormalization name=bn_Conv1, built=True>
    >>> model = accumops.GradientAccumulateModel(net, micro_batch_size=8)
    """
    check_statistics(statistics)
    check_window_memory(statistics, every, memory)
    rebuilder = Rebuilder(
        keras.layers.BatchNormalization,
        AccumBatchNormalization,
        accum_steps=accum_steps,
        statistics=statistics,
        every=every,
        memory=memory,
    )
    return rebuilder.run(model)


def restore_batchnorm_layers(model: keras.Model) -> keras.Model:
    """Returns a copy of a model in which every `AccumBatchNormalization` is a `keras.layers.BatchNormalization`.

    It is the way back from `replace_batchnorm_layers`, for models that are to be loaded without accumops. An open
    window of a layer is not carried over: the moving statistics are those after the last window that was closed.

    Args:
        model: A functional or Sequential `keras.Model`. Of a `GradientAccumulateModel`, give its attribute `model`.

    Returns:
        The new model, not compiled.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: As `replace_batchnorm_layers` does.

    Example:

    >>> inputs = keras.Input((3,))
    >>> net = keras.Model(inputs, accumops.AccumBatchNormalization(name="norm")(inputs))
    >>> accumops.restore_batchnorm_layers(net).get_layer("norm")
    <BatchNormalization name=norm, built=True>
    """
    return Rebuilder(AccumBatchNormalization, keras.layers.BatchNormalization).run(model)
