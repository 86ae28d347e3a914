"""What XLA compiles of a training step: the whole step, or forward and backward alone.

If forward and backward alone, the fused ops accumulate and update outside of XLA. That is better in two cases:

- A step is a micro-batch. It contains the condition that ends a window, and XLA copies all variables that the branches
  of a condition use.
- XLA is slow within the loop over micro-batches: on a CPU it runs convolutions on one thread there, and it makes the
  gradients of embeddings dense.

A window that runs layer by layer has no such passes: XLA compiles the whole step.
"""

import keras
import tensorflow as tf

from accumops.adapters.keras_layer import layers_within
from accumops.window.coupling import couples

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


def compiles_passes(model: keras.Model, *, loops: bool) -> bool:
    """Whether XLA compiles forward and backward alone.

    Args:
        model: The model, compiled.
        loops: Whether a step loops over micro-batches, as with `micro_batch_size`.
    """
    if not model.jit_compile:
        return False
    if loops and any(couples(layer) for layer in layers_within(model)):
        return False
    slow = (keras.layers.Embedding, *(() if tf.config.list_physical_devices("GPU") else _CONVOLUTIONS))
    return not loops or any(isinstance(layer, slow) for layer in layers_within(model))
