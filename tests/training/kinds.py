"""Small models of the kinds that people train, with data for them."""

import functools
import inspect

import keras
import numpy as np
import tensorflow as tf

BATCH, MICRO, UPDATES = 8, 2, 2
SAMPLES, RATE = BATCH * UPDATES, 0.5
WORDS, LABELS, LENGTH = 11, 4, 4


def tokens(rng, high=WORDS, length=LENGTH):
    """Sequences of different lengths, padded with 0."""
    valid = np.arange(length) < rng.integers(1, length + 1, (SAMPLES, 1))
    return np.where(valid, rng.integers(1, high, (SAMPLES, length)), 0), valid


class Kind:
    """A kind of model whose loss is a mean over samples.

    Args:
        rng: Draws the data.
    """

    counts_positions = False
    """Whether the loss divides by positions, of which micro-batches of one size have different numbers."""

    def __init__(self, rng):
        self.x, self.y = self.data(rng)

    def loss(self, reduction):
        return keras.losses.MeanSquaredError(reduction)

    def data(self, rng):
        raise NotImplementedError

    def network(self):
        raise NotImplementedError

    def model(self):
        """The model, with the same weights each time."""
        keras.utils.set_random_seed(3)
        return self.network()

    def divisor(self, x, y):
        """What the mean of the loss divides by on a batch."""
        return tf.shape(tf.nest.flatten(y)[0])[0]


def attention_block(hidden):
    """Self-attention and a dense layer, each added to what comes in."""
    attended = keras.layers.MultiHeadAttention(2, 4)(hidden, hidden)
    hidden = keras.layers.LayerNormalization()(hidden + attended)
    return hidden + keras.layers.Dense(hidden.shape[-1], "gelu")(hidden)


class TextTransformer(Kind):
    """Masked language modelling: the loss is over a few positions, and ignores the labels of the others."""

    counts_positions = True

    def loss(self, reduction):
        return keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1, reduction=reduction)

    def data(self, rng):
        words, valid = tokens(rng)
        hidden = valid & (rng.random(words.shape) < 0.5)
        hidden[:, 0] = True  # each sample has one position that counts
        return np.where(hidden, WORDS, words), np.where(hidden, words, -1)

    def network(self):
        words = keras.Input((LENGTH,), dtype="int32")
        positions = keras.layers.Embedding(LENGTH, 8)(keras.ops.arange(LENGTH))
        hidden = keras.layers.Embedding(WORDS + 1, 8)(words) + positions
        return keras.Model(words, keras.layers.Dense(WORDS)(attention_block(hidden)))

    def divisor(self, x, y):
        return tf.math.count_nonzero(y != -1)


class Tagger(Kind):
    """Named entities: a label for each word, and padding that the embedding masks."""

    counts_positions = True

    def loss(self, reduction):
        return keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)

    def data(self, rng):
        words, _ = tokens(rng)
        return words, rng.integers(0, LABELS, words.shape)

    def network(self):
        words = keras.Input((LENGTH,), dtype="int32")
        hidden = keras.layers.Embedding(WORDS, 8, mask_zero=True)(words)
        hidden = keras.layers.Bidirectional(keras.layers.SimpleRNN(4, return_sequences=True, unroll=True))(hidden)
        return keras.Model(words, keras.layers.Dense(LABELS)(hidden))

    def divisor(self, x, y):
        return tf.math.count_nonzero(x)


class SequenceToSequence(Kind):
    """Translation: an encoder, and a decoder that starts from its state and attends to it; both have padding."""

    loss = Tagger.loss
    counts_positions = True

    def data(self, rng):
        source, target = tokens(rng)[0], tokens(rng, length=LENGTH + 1)[0]
        return {"source": source, "so_far": target[:, :-1]}, target[:, 1:]

    def network(self):
        inputs = {name: keras.Input((LENGTH,), dtype="int32", name=name) for name in ("source", "so_far")}
        source, so_far = (keras.layers.Embedding(WORDS, 6, mask_zero=True)(each) for each in inputs.values())
        encoded, state = keras.layers.GRU(6, return_sequences=True, return_state=True, unroll=True)(source)
        decoded = keras.layers.GRU(6, return_sequences=True, unroll=True)(so_far, initial_state=state)
        attended = keras.layers.Attention()([decoded, encoded])
        return keras.Model(inputs, keras.layers.Dense(WORDS)(keras.layers.Concatenate()([decoded, attended])))

    def divisor(self, x, y):
        return tf.math.count_nonzero(x["so_far"])


class Siamese(Kind):
    """Two inputs through one encoder; near for pairs of one class, and apart for others."""

    def loss(self, reduction):
        class Pairs(keras.losses.Loss):
            """Contrastive over pairs: each sample is a pair, so that the loss is a mean over samples."""

            def call(self, y_true, y_pred):
                apart = keras.ops.square(keras.ops.maximum(1 - y_pred, 0))
                return keras.ops.mean(y_true * keras.ops.square(y_pred) + (1 - y_true) * apart, axis=-1)

        return Pairs(reduction=reduction)

    def data(self, rng):
        pairs = rng.standard_normal((2, SAMPLES, 5)).astype("float32")
        return tuple(pairs), rng.integers(0, 2, (SAMPLES, 1)).astype("float32")

    def network(self):
        encoder = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(4)])
        pair = keras.Input((5,)), keras.Input((5,))
        difference = keras.layers.Subtract()([encoder(each) for each in pair])
        return keras.Model(pair, keras.ops.norm(difference, axis=-1, keepdims=True))


class WideAndDeep(Kind):
    """Crossed categories straight to the output, and an embedding with numbers through hidden layers."""

    def loss(self, reduction):
        return keras.losses.BinaryCrossentropy(True, reduction=reduction)

    def data(self, rng):
        inputs = {
            "wide": rng.integers(0, 2, (SAMPLES, 9)).astype("float32"),
            "category": rng.integers(0, 5, (SAMPLES, 2)),
            "numbers": rng.standard_normal((SAMPLES, 3)).astype("float32"),
        }
        return inputs, rng.integers(0, 2, (SAMPLES, 1)).astype("float32")

    def network(self):
        inputs = {
            "wide": keras.Input((9,), name="wide"),
            "category": keras.Input((2,), dtype="int32", name="category"),
            "numbers": keras.Input((3,), name="numbers"),
        }
        embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(inputs["category"]))
        deep = keras.layers.Dense(8, "relu")(keras.layers.Concatenate()([embedded, inputs["numbers"]]))
        return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()([inputs["wide"], deep])))


class Variational(Kind):
    """A variational autoencoder, whose divergence is a mean over samples that `add_loss` adds; noise is an input."""

    def data(self, rng):
        x = rng.standard_normal((SAMPLES, 6)).astype("float32")
        return (x, rng.standard_normal((SAMPLES, 2)).astype("float32")), x

    def network(self):
        class Sampling(keras.layers.Layer):
            def call(self, inputs):
                mean, log_variance, noise = inputs
                self.add_loss(divergence(mean, log_variance))
                return mean + keras.ops.exp(0.5 * log_variance) * noise

        x, noise = keras.Input((6,)), keras.Input((2,))
        hidden = keras.layers.Dense(8, "tanh")(x)
        code = Sampling()([keras.layers.Dense(2)(hidden), keras.layers.Dense(2)(hidden), noise])
        return keras.Model((x, noise), keras.layers.Dense(6)(keras.layers.Dense(8, "tanh")(code)))


def divergence(mean, log_variance):
    """The KL divergence of a normal distribution from the standard one, as a mean over samples."""
    each = -0.5 * (1 + log_variance - keras.ops.square(mean) - keras.ops.exp(log_variance))
    return keras.ops.mean(keras.ops.sum(each, axis=-1))


@functools.cache
def language_model():
    """A GPT-2 of keras-hub with random weights, of which only low-rank matrices are trained."""
    import keras_hub

    class LowRankLanguageModel(Kind):
        loss = TextTransformer.loss
        counts_positions = True

        def data(self, rng):
            words, valid = tokens(rng, length=LENGTH + 1)
            inputs = {"token_ids": words[:, :-1], "padding_mask": valid[:, :-1]}
            return inputs, np.where(valid[:, :-1], words[:, 1:], -1)

        def network(self):
            backbone = keras_hub.models.GPT2Backbone(WORDS, 1, 2, 8, 16, dropout=0.0, max_sequence_length=LENGTH)
            backbone.enable_lora(2)
            return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)

        divisor = TextTransformer.divisor

    return LowRankLanguageModel


FUNCTIONAL = (TextTransformer, Tagger, SequenceToSequence, Siamese, WideAndDeep, Variational)
KINDS = {each.__name__: each for each in FUNCTIONAL}


class OwnStep(keras.Model):
    """Trains in a `train_step` of its own, of which subclasses say the loss."""

    def train_step(self, data):
        x, y = data[0], data[1] if len(data) > 1 else None
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}

    def loss_of(self, x, y):
        raise NotImplementedError


class VariationalWithOwnStep(Variational):
    """The same with a `train_step`."""

    def network(self):
        class Autoencoder(OwnStep):
            def __init__(self):
                super().__init__()
                self.encoder, self.decoder = (
                    keras.Sequential([keras.Input((size,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(units)])
                    for size, units in ((6, 4), (2, 6))
                )
                self.built = True

            def loss_of(self, x, y):
                image, noise = x
                mean, log_variance = tf.split(self.encoder(image), 2, axis=-1)
                decoded = self.decoder(mean + tf.exp(0.5 * log_variance) * noise)
                return tf.reduce_mean((decoded - y) ** 2) + divergence(mean, log_variance)

        return Autoencoder()


def teacher_and_student():
    teacher, student = (
        keras.Sequential([keras.Input((5,)), keras.layers.Dense(units, "tanh"), keras.layers.Dense(LABELS)])
        for units in (16, 6)
    )
    teacher.trainable = False
    return teacher, student


def distance(teacher_logits, student_logits):
    """The divergence of softened predictions, a mean over samples."""
    soft = keras.ops.softmax(teacher_logits / 2), keras.ops.softmax(student_logits / 2)
    return keras.losses.KLDivergence()(*soft) * 4


class Distillation(Kind):
    """A student that learns from labels and from a frozen teacher, in a `compute_loss` of its own."""

    loss = Tagger.loss

    def data(self, rng):
        return rng.standard_normal((SAMPLES, 5)).astype("float32"), rng.integers(0, LABELS, SAMPLES)

    def network(self):
        class Distiller(keras.Model):
            def __init__(self):
                super().__init__()
                self.teacher, self.student = teacher_and_student()
                self.built = True

            def call(self, x):
                return self.student(x)

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                hard = super().compute_loss(x, y, y_pred, sample_weight, training)
                return 0.3 * hard + 0.7 * distance(self.teacher(x), y_pred)

        return Distiller()


class DistillationWithOwnStep(Distillation):
    """The same with a `train_step`."""

    def network(self):
        class Distiller(OwnStep):
            def __init__(self):
                super().__init__()
                self.teacher, self.student = teacher_and_student()
                self.built = True

            def loss_of(self, x, y):
                logits = self.student(x, training=True)
                hard = keras.losses.SparseCategoricalCrossentropy(True)(y, logits)
                return 0.3 * hard + 0.7 * distance(self.teacher(x), logits)

        return Distiller()


class Adversarial(Kind):
    """A generator and a discriminator with an optimizer each; noise is an input.

    Both gradients are taken before either network moves, as a window of micro-batches takes them.
    """

    def data(self, rng):
        return tuple(rng.standard_normal((2, SAMPLES, 2)).astype("float32")), None

    def network(self):
        return Gan()

    def divisor(self, x, y):
        return tf.shape(x[0])[0]


class Gan(keras.Model):
    """The networks of `Adversarial`."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = (
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(units)])
            for units in (2, 1)
        )
        self.built = True

    def compile(self, optimizer, generator_optimizer, **kwargs):
        super().compile(optimizer=optimizer, **kwargs)
        self.generator_optimizer = generator_optimizer

    def discriminator_loss(self, real, noise):
        true, false = self.discriminator(real), self.discriminator(self.generator(noise))
        return tf.reduce_mean(tf.nn.softplus(-true)) + tf.reduce_mean(tf.nn.softplus(false))

    def generator_loss(self, noise):
        return tf.reduce_mean(tf.nn.softplus(-self.discriminator(self.generator(noise))))

    def train_step(self, data):
        real, noise = data[0]
        discriminates, generates = self.discriminator.trainable_variables, self.generator.trainable_variables
        with tf.GradientTape(persistent=True) as tape:
            loss, generator_loss = self.discriminator_loss(real, noise), self.generator_loss(noise)
        gradients = tape.gradient(loss, discriminates), tape.gradient(generator_loss, generates)
        self.optimizer.apply(gradients[0], discriminates)
        self.generator_optimizer.apply(gradients[1], generates)
        return {"loss": loss, "generator_loss": generator_loss}


OWN_STEPS = {
    each.__name__: each for each in (VariationalWithOwnStep, Distillation, DistillationWithOwnStep, Adversarial)
}


def compile_arguments(kind, model, optimizer, reduction="sum_over_batch_size"):
    """The arguments of `compile`, with `optimizer()` for each of the optimizers that the model has."""
    arguments = {"optimizer": optimizer()}
    if "generator_optimizer" in inspect.signature(model.compile).parameters:
        arguments["generator_optimizer"] = optimizer()
    elif not isinstance(model, OwnStep):
        arguments["loss"] = kind.loss(reduction)
    return arguments
