"""A momentum encoder and a queue of negatives (MoCo), with windows of 512 images in micro-batches of 32.

    pip install scikit-learn
    python examples/momentum_contrast.py

The encoder embeds one view of each image, and is trained. The momentum encoder embeds another view; it follows the
encoder slowly, and gets no gradient. The loss compares each embedding with the key of its image and with a queue of
earlier keys. Keys and queue are tensors that the loss uses, so they are made before the window, and the two are updated
after it.
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import accumops

BATCH, MICRO, QUEUE, UPDATES = 512, 32, 2048, 80
TEMPERATURE, MOMENTUM = 0.2, 0.98


def views(images, rng):
    """Returns each image moved by up to a pixel each way, with noise."""
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    corners = rng.integers(0, 3, size=(len(images), 2))
    moved = np.stack([image[i : i + 8, j : j + 8] for image, (i, j) in zip(padded, corners, strict=True)])
    return tf.constant(moved + rng.normal(scale=0.1, size=moved.shape), tf.float32)


def make_encoder():
    """Returns an encoder whose embeddings have length 1."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            keras.layers.Conv2D(64, 3, activation="relu", strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(32),
            keras.layers.UnitNormalization(),
        ]
    )


def main():
    """Trains the encoder, and prints the accuracy of a linear probe on its features."""
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = (digits.images / 16).astype("float32")[..., None]
    encoder, momentum_encoder = make_encoder(), make_encoder()
    momentum_encoder.set_weights(encoder.get_weights())
    optimizer = keras.optimizers.Adam(1e-3)
    queue = tf.Variable(tf.math.l2_normalize(tf.random.normal([QUEUE, 32]), axis=1))

    @tf.function
    def train_step(queries, others):
        keys = momentum_encoder(others, training=False)

        def loss_of(embeddings):
            right = tf.reduce_sum(embeddings * keys, axis=1, keepdims=True)
            logits = tf.concat([right, embeddings @ tf.transpose(queue)], axis=1) / TEMPERATURE
            labels = tf.zeros(BATCH, tf.int32)  # the first is the right one
            return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))

        loss, gradients = accumops.window_gradients(encoder, queries, loss_of, micro_batch_size=MICRO)
        optimizer.apply(gradients, encoder.trainable_variables)
        for slow, fast in zip(momentum_encoder.trainable_variables, encoder.trainable_variables, strict=True):
            slow.assign(MOMENTUM * slow + (1 - MOMENTUM) * fast)
        queue.assign(tf.concat([queue[BATCH:], keys], axis=0))
        return loss

    rng = np.random.default_rng(0)
    for update in range(UPDATES):
        batch = images[rng.choice(1200, BATCH, replace=False)]
        loss = train_step(views(batch, rng), views(batch, rng))
        if update % 20 == 19:
            print(f"update {update + 1:3d}   loss {loss:.3f}")
    features = encoder.predict(images, verbose=0)
    probe = LogisticRegression(max_iter=2000).fit(features[:1200], digits.target[:1200])
    print(f"linear probe {probe.score(features[1200:], digits.target[1200:]):.3f}")


if __name__ == "__main__":
    main()
