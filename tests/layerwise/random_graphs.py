"""Random functional models with batch normalization in all kinds of places."""

import keras
import numpy as np
from whole_batches import SquaresLoss

L = keras.layers
SIDE = 4


class RandomGraph:
    """A random model, and data for it.

    Args:
        seed: Determines both.
    """

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)
        self._layers = {}
        keras.utils.set_random_seed(seed)
        inputs = [keras.Input((SIDE, SIDE, 2)), keras.Input((3,))][: self._rng.integers(1, 3)]
        self._pool = list(inputs)
        for _ in range(self._rng.integers(6, 14)):
            self._pool.append(self._step())
        late = self._pool[-4:]
        outputs = [late[i] for i in self._rng.permutation(len(late))[: self._rng.integers(1, 4)]]
        outputs = [each if len(each.shape) == 2 else L.GlobalAveragePooling2D()(each) for each in outputs]
        outputs = [L.Dense(2)(each) if self._rng.random() < 0.6 else each for each in outputs]
        self.net = keras.Model(inputs, outputs)
        samples = 31
        self.x = [self._rng.normal(size=(samples, *each.shape[1:])) for each in self.net.inputs]
        self.y = [self._rng.normal(size=(samples, *each.shape[1:])) for each in self.net.outputs]
        self.loss = ["mse"] * len(outputs)

    @property
    def coupled(self):
        """The calls of batch normalization."""
        return [each for each in self.net._flatten_layers() if isinstance(each, L.BatchNormalization)]

    def _pick(self, *like):
        """A tensor, mostly a late one; with the shape of another if one is given."""
        found = [each for each in self._pool if not like or each.shape == like[0].shape]
        return found[-1 - min(int(self._rng.exponential(1.5)), len(found) - 1)]

    def _shared(self, kind, key, make):
        """A layer of some kind, now and then one that has been called before."""
        known = self._layers.setdefault((kind, key), [])
        if not known or self._rng.random() < 0.7:
            known.append(make())
        return known[self._rng.integers(len(known))]

    def _normalization(self, shape):
        axis = 1 if len(shape) == 4 and self._rng.random() < 0.2 else -1
        scale, center = self._rng.random(2) < 0.8
        settings = {"axis": axis, "scale": bool(scale), "center": bool(center), "momentum": 0.9, "epsilon": 0.01}
        layer = L.BatchNormalization(**settings, gamma_regularizer="l2" if scale and self._rng.random() < 0.3 else None)
        layer.trainable = bool(self._rng.random() < 0.85)
        return layer

    def _linear(self, shape, units):
        regularizer = "l2" if self._rng.random() < 0.3 else None
        if len(shape) == 4:
            return L.Conv2D(units, 3, padding="same", kernel_regularizer=regularizer)
        return L.Dense(units, kernel_regularizer=regularizer)

    def _step(self):
        x = self._pick()
        shape = tuple(x.shape)
        kind = self._rng.choice(_KINDS, p=_SHARES)
        if kind == "norm":
            return self._shared(kind, shape, lambda: self._normalization(shape))(x)
        if kind == "linear":
            units = int(self._rng.integers(2, 5))
            return self._shared(kind, (shape, units), lambda: self._linear(shape, units))(x)
        if kind == "activation":
            return L.Activation(self._rng.choice(["tanh", "softplus", "gelu"]))(x)
        if kind == "add":
            return L.Add()([x, self._pick(x)])
        if kind == "multiply":
            return x * keras.ops.tanh(self._pick(x))
        if kind == "concatenate":
            return L.Concatenate()([x, next(each for each in reversed(self._pool) if each.shape[:-1] == shape[:-1])])
        if kind == "pool":
            return L.GlobalAveragePooling2D()(x) if len(shape) == 4 else keras.ops.reshape(x, (-1, shape[-1]))
        if kind == "loss":
            return SquaresLoss()(x)
        if kind == "nested":
            return self._shared(kind, shape, lambda: self._nested(shape))(x)
        return L.LayerNormalization()(x)

    def _nested(self, shape):
        """A model of the same shape, at times with a model in it."""
        if self._rng.random() < 0.5:
            parts = [self._linear(shape, shape[-1]), self._normalization(shape), L.Activation("tanh")]
            net = keras.Sequential([keras.Input(shape[1:]), *parts])
        else:
            x = keras.Input(shape[1:])
            hidden = self._normalization(shape)(self._linear(shape, shape[-1])(x))
            net = keras.Model(x, x + L.Activation("tanh")(hidden))
        return keras.Sequential([keras.Input(shape[1:]), net]) if self._rng.random() < 0.3 else net


_WEIGHTS = {
    "norm": 6,
    "linear": 4,
    "activation": 3,
    "add": 2,
    "multiply": 1,
    "concatenate": 1,
    "pool": 1,
    "loss": 2,
    "nested": 1.5,
    "layer_norm": 0.5,
}
_KINDS = list(_WEIGHTS)
_SHARES = np.array(list(_WEIGHTS.values())) / sum(_WEIGHTS.values())
