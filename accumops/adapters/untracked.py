"""What Keras and TensorFlow are not to find among an object's attributes."""

import types


class Untracked(types.SimpleNamespace):
    """A namespace for attributes that are not part of an object's state.

    `tf.Module`, `keras.Layer`, `keras.Model` and `keras.optimizers.Optimizer` look at each attribute that is set: they
    save the variables, layers and functions that they find, and wrap lists and dicts. They do not look into this.
    """
