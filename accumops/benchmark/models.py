"""The models and the data that the suites train with."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import tensorflow as tf

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Problem:
    """A classifier to train, and the shape and kind of its inputs."""

    name: str
    build: Callable[[ModuleType], Any]
    """Makes the model. The argument is the module of Keras, or of Keras 2."""
    input_shape: tuple[int, ...]
    vocabulary: int | None = None
    """The number of different tokens, if inputs are tokens."""
    large_table: bool = False
    """Whether an embedding is most of the model. Then updates of touched rows alone are measured too."""
    normalizes: bool = False
    """Whether it has batch normalization. Then it is measured with accumops' as well."""
    windows: int = 1
    """How many windows to time at once. A window of about a millisecond alone still finds the previous contender's data
    in the caches."""
    warmup: int = 3
    """Untimed rounds before the timed ones. Until TensorFlow has run an operation about a hundred times, it takes the
    operation for a slow one and hands it to another thread, which costs much of a short step."""

    def data(self, samples: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns random samples and labels, the same each time."""
        shape = (samples, *self.input_shape)
        if self.vocabulary is None:
            x = tf.random.stateless_normal(shape, [1, 0])
        else:
            x = tf.random.stateless_uniform(shape, [1, 0], maxval=self.vocabulary, dtype=tf.int32)
        return x, tf.random.stateless_uniform((samples,), [2, 0], maxval=CLASSES, dtype=tf.int32)


def perceptron(width: int, depth: int) -> Callable[[ModuleType], Any]:
    """Dense layers with ReLU, `depth` of them, all of one width."""

    def build(library: ModuleType) -> Any:
        hidden = [library.layers.Dense(width, activation="relu") for _ in range(depth)]
        return library.Sequential([library.Input((width,)), *hidden, library.layers.Dense(CLASSES)])

    return build


def convolutional_network(library: ModuleType = keras) -> Any:
    """Six 3x3 convolutions of 32, 64 and 128 channels for images of 32x32, with batch normalization and ReLU."""
    layers: list[Any] = [library.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        for _ in range(2):
            layers += [
                library.layers.Conv2D(filters, 3, padding="same", use_bias=False),
                library.layers.BatchNormalization(),
                library.layers.ReLU(),
            ]
        layers.append(library.layers.MaxPooling2D())
    return library.Sequential([*layers, library.layers.GlobalAveragePooling2D(), library.layers.Dense(CLASSES)])


def bag_of_words(vocabulary: int, width: int, tokens: int) -> Callable[[ModuleType], Any]:
    """The mean of the tokens' embeddings, and one Dense layer."""

    def build(library: ModuleType) -> Any:
        return library.Sequential(
            [
                library.Input((tokens,), dtype="int32"),
                library.layers.Embedding(vocabulary, width),
                library.layers.GlobalAveragePooling1D(),
                library.layers.Dense(CLASSES),
            ]
        )

    return build


def transformer(vocabulary: int, width: int, tokens: int, heads: int, blocks: int) -> Callable[[ModuleType], Any]:
    """Pre-norm blocks of self-attention and two Dense layers over embedded tokens and positions."""

    def build(library: ModuleType) -> Any:
        layers: Any = library.layers

        class Positions(layers.Layer):
            def build(self, input_shape: Any) -> None:
                self.table = self.add_weight(name="table", shape=(tokens, width), initializer="uniform")
                self.built = True

            def call(self, x: Any) -> Any:
                return x + self.table

        inputs = library.Input((tokens,), dtype="int32")
        x = Positions()(layers.Embedding(vocabulary, width)(inputs))
        for _ in range(blocks):
            normed = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(normed, normed)])
            hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(width)(hidden)])
        pooled = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
        return library.Model(inputs, layers.Dense(CLASSES)(pooled))

    return build


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("MLP 64x2", perceptron(64, 2), (64,), windows=10, warmup=10),
        Problem("MLP 128x60", perceptron(128, 60), (128,), windows=2, warmup=50),
        Problem("MLP 2048x4", perceptron(2048, 4), (2048,)),
        Problem("convolutional network", convolutional_network, (32, 32, 3), normalizes=True),
        Problem(
            "embedding 200,000x64",
            bag_of_words(200_000, 64, 32),
            (32,),
            vocabulary=200_000,
            large_table=True,
            warmup=30,
        ),
        Problem("transformer", transformer(5_000, 128, 64, 4, 2), (64,), vocabulary=5_000),
    )
}
