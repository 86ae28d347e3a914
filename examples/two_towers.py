"""Two towers and CLIP's loss in a loop of your own: from the left half of a digit, find its right half.

    pip install scikit-learn
    python examples/two_towers.py

Each update sees the 1024 pairs of the training set, in micro-batches of 32. `accumops.window_gradients` gives the loss
of all pairs and its gradients; it takes the model that has both towers. For comparison, the same loop with the mean of
the losses of micro-batches, each of which has 31 wrong halves to tell apart instead of 1023.
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import accumops

BATCH, MICRO, UPDATES = 1024, 32, 150


def halves():
    """Returns the left and right halves of training images, and those of test images."""
    images = (load_digits().images / 16).astype("float32")
    images = images[np.random.default_rng(0).permutation(len(images))]
    left, right = images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)
    return (left[:BATCH], right[:BATCH]), (left[BATCH:], right[BATCH:])


def towers():
    """Returns a model of pairs: two towers, whose embeddings are scaled by one learned temperature."""
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((32,)), keras.Input((32,))]
    embeddings = []
    for half in inputs:
        hidden = keras.layers.Dense(128, activation="relu")(half)
        embeddings.append(keras.layers.Reshape((1, 32))(keras.layers.Dense(32)(hidden)))
    pair = keras.layers.Concatenate(axis=1)(embeddings)
    return keras.Model(inputs, accumops.losses.LearnedTemperature(0.1)(pair))


def train(pairs, over_window):
    """Trains two towers, and returns them."""
    model = towers()
    optimizer = keras.optimizers.Adam(2e-3)
    clip = accumops.losses.CLIPLoss(temperature=None)

    def loss_of(outputs):
        return clip(tf.zeros(tf.shape(outputs)[0]), outputs)

    @tf.function
    def update(pairs):
        if over_window:
            loss, gradients = accumops.window_gradients(model, pairs, loss_of, micro_batch_size=MICRO)
        else:
            losses = []
            with tf.GradientTape() as tape:
                for i in range(0, BATCH, MICRO):
                    losses.append(loss_of(model([half[i : i + MICRO] for half in pairs], training=True)))
                loss = tf.reduce_mean(losses)
            gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    for _ in range(UPDATES):
        update([tf.constant(half) for half in pairs])
    return model


def found(model, pairs):
    """Returns the share of left halves whose right half has the most similar embedding of all."""
    embeddings = model.predict(pairs, verbose=0)
    nearest = np.argmax(embeddings[:, 0] @ embeddings[:, 1].T, axis=1)
    return np.mean(nearest == np.arange(len(nearest)))


def main():
    """Trains in both ways, and prints how many of the test set's halves are found."""
    pairs, test_pairs = halves()
    for name, over_window in (("window of 1024", True), ("micro-batches of 32 alone", False)):
        share = found(train(pairs, over_window), test_pairs)
        print(f"{name:26s} finds {share:.1%} of {len(test_pairs[0])} right halves")


if __name__ == "__main__":
    main()
