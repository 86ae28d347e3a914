"""Models, their data and how they are compiled, to train with one large batch and in windows."""

import keras
import numpy as np
import tensorflow as tf

from accumops import AdaptiveGradientClipping

BATCH, MICRO, UPDATES = 64, 16, 5
OPTIMIZERS = {
    "momentum": lambda **kw: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, **kw),
    "Adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "AdamW": lambda **kw: keras.optimizers.AdamW(0.01, weight_decay=0.1, **kw),
    "RMSprop": lambda **kw: keras.optimizers.RMSprop(0.005, **kw),
    "Adafactor": lambda **kw: keras.optimizers.Adafactor(0.01, **kw),
    "Lion": lambda **kw: keras.optimizers.Lion(0.002, **kw),
}
MODES = {
    "accum_steps": {"accum_steps": BATCH // MICRO},
    "micro_batch_size": {"micro_batch_size": 24},
    "parallel": {"micro_batch_size": 12, "parallel_micro_batches": 2},
}
RUNS = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}


class Problem:
    """A model, its data and how it is compiled; the data's last batch is a ragged one."""

    def __init__(self, rng, samples=BATCH * (UPDATES - 1) + 38):
        self.x = rng.standard_normal((samples, 5)).astype("float32")
        self.y = rng.standard_normal((samples, 3)).astype("float32")
        self.fit_arguments = {}
        self.model_arguments = {}
        self.compile_arguments = {"loss": "mse", "metrics": ["mae"]}
        self.optimizer_arguments = {}

    def plain(self, optimizer):
        """The optimizer of the large batch in plain Keras."""
        return optimizer

    def layers(self):
        return [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)]

    def model(self, seed=7):
        keras.utils.set_random_seed(seed)
        return keras.Sequential([keras.Input(self.x.shape[1:], dtype=self.x.dtype), *self.layers()])


class SampleWeights(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.fit_arguments = {"sample_weight": rng.uniform(0, 2, len(self.x)).astype("float32")}
        self.compile_arguments["weighted_metrics"] = ["mse"]


class WeightedMean(SampleWeights):
    """A loss that divides by the sum of sample weights."""

    def __init__(self, rng):
        super().__init__(rng)
        self.compile_arguments["loss"] = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        self.model_arguments = {"normalization": "weights"}


class Masked(Problem):
    """A loss over the valid tokens of sequences, of which each micro-batch has another number."""

    def __init__(self, rng):
        super().__init__(rng)
        self.x = rng.standard_normal((len(self.x), 7, 4)).astype("float32")
        self.x[:, 4:] *= rng.integers(0, 2, (len(self.x), 3, 1))  # a step of zeros is masked
        self.y = rng.standard_normal((len(self.x), 7, 3)).astype("float32")
        self.model_arguments = {"normalization": "weights"}
        self.compile_arguments = {"loss": "mse"}

    def layers(self):
        return [keras.layers.Masking(), *super().layers()]


class ClassWeights(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.y = rng.integers(0, 3, len(self.x))
        self.fit_arguments = {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.compile_arguments = {"loss": loss, "metrics": ["accuracy"]}


class Regularized(Problem):
    """Regularization counts once, and a constraint acts once, however many micro-batches there are."""

    def layers(self):
        regularizer, constraint = keras.regularizers.L2(0.05), keras.constraints.MaxNorm(0.7)
        first = keras.layers.Dense(16, "tanh", kernel_regularizer=regularizer, kernel_constraint=constraint)
        return [first, keras.layers.Dense(3, bias_regularizer=keras.regularizers.L1(0.01))]


class Frozen(Problem):
    def layers(self):
        first, second = super().layers()
        first.trainable = False
        return [first, second]


class ClipNorm(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.optimizer_arguments = {"clipnorm": 0.05}


class ClipValue(ClipNorm):
    def __init__(self, rng):
        super().__init__(rng)
        self.optimizer_arguments = {"clipvalue": 0.02}


class GlobalClipNorm(ClipNorm):
    def __init__(self, rng):
        super().__init__(rng)
        self.optimizer_arguments = {"global_clipnorm": 0.1}


class MovingAverage(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.optimizer_arguments = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3}


class TwoInputsAndOutputs(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.x = {"a": self.x, "b": self.x[:, :2] + 1}
        self.y = {"u": self.y, "v": self.y[:, :1]}
        self.compile_arguments = {"loss": {"u": "mse", "v": "mae"}, "loss_weights": {"u": 1.0, "v": 0.3}}

    def model(self, seed=7):
        keras.utils.set_random_seed(seed)
        a, b = keras.Input((5,), name="a"), keras.Input((2,), name="b")
        hidden = keras.layers.Concatenate()([keras.layers.Dense(8, "tanh")(a), b])
        outputs = {name: keras.layers.Dense(units, name=name)(hidden) for name, units in (("u", 3), ("v", 1))}
        return keras.Model({"a": a, "b": b}, outputs)


class ListOutputs(Problem):
    """Outputs in a list, whose losses are found by the layers' names."""

    def __init__(self, rng):
        super().__init__(rng)
        self.y = [self.y, self.y[:, :1]]
        self.compile_arguments = {"loss": {"u": "mse", "v": "mae"}, "metrics": {"u": ["mae"]}}

    def model(self, seed=7):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((5,))
        hidden = keras.layers.Dense(8, "tanh")(inputs)
        return keras.Model(inputs, [keras.layers.Dense(3, name="u")(hidden), keras.layers.Dense(1, name="v")(hidden)])


class WeightedMeanInAList(WeightedMean):
    def __init__(self, rng):
        super().__init__(rng)
        self.compile_arguments["loss"] = [self.compile_arguments["loss"]]


class TinyLastBatch(Problem):
    """The last batch is smaller than a micro-batch."""

    def __init__(self, rng):
        super().__init__(rng, samples=BATCH * (UPDATES - 1) + 5)


class Embedding(Problem):
    """Sparse gradients of a table of which a window touches few rows."""

    def __init__(self, rng):
        super().__init__(rng)
        self.x = rng.zipf(1.3, (len(self.x), 6)).clip(max=1100).astype("int32") - 1

    def layers(self):
        return [keras.layers.Embedding(1100, 64), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]

    def plain(self, optimizer):
        """Keras's own squares each of a row's sparse gradients by itself: its large batch has to be given dense."""
        return overridden(
            optimizer,
            apply=lambda base, grads, variables: base.apply([tf.convert_to_tensor(g) for g in grads], variables),
        )


class AdaptiveClipping(Problem):
    def __init__(self, rng):
        super().__init__(rng)
        self.model_arguments = {"gradient_clipping": AdaptiveGradientClipping(0.02)}

    def plain(self, optimizer):
        def clip(gradient, variable):
            axis = 0 if gradient.shape.rank == 2 else None
            size = tf.maximum(tf.norm(tf.convert_to_tensor(variable), axis=axis, keepdims=True), 1e-3)
            norm = tf.maximum(tf.norm(gradient, axis=axis, keepdims=True), 1e-12)
            return gradient * tf.minimum(0.02 * size / norm, 1)

        def apply(base, grads, variables):
            return base.apply([clip(g, v) for g, v in zip(grads, variables, strict=True)], variables)

        return overridden(optimizer, apply=apply)


def overridden(optimizer, apply):
    """The optimizer, of a class whose `apply` is another."""
    kind = type(optimizer)

    def call(self, grads, trainable_variables=None):
        return apply(super(plain, self), list(grads), trainable_variables)

    plain = type(kind.__name__, (kind,), {"apply": call})
    return plain.from_config(optimizer.get_config())


FEATURES = {
    each.__name__: each
    for each in (
        Problem,
        SampleWeights,
        WeightedMean,
        Masked,
        ClassWeights,
        Regularized,
        Frozen,
        ClipNorm,
        ClipValue,
        GlobalClipNorm,
        MovingAverage,
        TwoInputsAndOutputs,
        ListOutputs,
        WeightedMeanInAList,
        TinyLastBatch,
        Embedding,
        AdaptiveClipping,
    )
}


def train(problem, optimizer, model, batch_size, **compile_arguments):
    """Trains for an epoch and returns its logs."""
    model.compile(optimizer, **problem.compile_arguments, **compile_arguments)
    return model.fit(
        problem.x, problem.y, batch_size=batch_size, shuffle=False, verbose=0, **problem.fit_arguments
    ).history


def largest_difference(a, b):
    """The largest difference of two models' weights, relative to the largest weight."""
    a, b = (np.concatenate([w.ravel() for w in model.get_weights()]) for model in (a, b))
    return np.abs(a - b).max() / np.abs(a).max()
