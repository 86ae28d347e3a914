"""Fine-tunes a network of keras.applications with batch normalization whose statistics are the large batch's.

    python examples/pretrained_swapped.py

`replace_batchnorm_layers` puts accumops' batch normalization into a network that exists, with its weights. The network
is MobileNetV2 with random weights here, so that nothing is downloaded; `weights="imagenet"` works in the same way. It
is trained on 64 images at a time in micro-batches of 8, with Keras's layers and with accumops'. The script prints

- how far the running variance of the first normalization is, after the first update, from where the variance of all 64
  images has to move it. Keras's layer has moved eight times, by the variances of 8 images each;
- what a training step takes in memory, for 8 images and for 64 at once.
"""

import keras
import numpy as np

import accumops

BATCH, MICRO, UPDATES = 64, 8, 4
MOMENTUM = 0.999  # of MobileNetV2's layers


def make_data():
    """Returns images with one bright quarter, labelled by that quarter."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, BATCH)
    images = rng.normal(0, 1, (BATCH, 64, 64, 3)).astype("float32")
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] += 1
    return images, labels


def variance_after_one_window(net, images):
    """Returns the running variance that the first normalization has to have after one window of these images."""
    channels = net.get_layer("Conv1")(images).numpy().astype("float64")
    before = net.get_layer("bn_Conv1").moving_variance.numpy()
    return before * MOMENTUM + channels.var(axis=(0, 1, 2)) * (1 - MOMENTUM)


def train(net, images, labels):
    """Makes updates. Returns the losses, and the running variance's error after the first, as a part of its move."""
    start = net.get_layer("bn_Conv1").moving_variance.numpy()
    wanted = variance_after_one_window(net, images)
    model = accumops.GradientAccumulateModel(net, micro_batch_size=MICRO)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    losses = [float(model.train_on_batch(images, labels))]
    found = net.get_layer("bn_Conv1").moving_variance.numpy()
    losses += [float(model.train_on_batch(images, labels)) for _ in range(UPDATES - 1)]
    return losses, np.abs(found - wanted).max() / np.abs(wanted - start).max()


def main():
    """Trains with either normalization, and prints losses, statistics and memory."""
    images, labels = make_data()
    keras.utils.set_random_seed(0)
    plain = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None, classes=4, classifier_activation=None)
    swapped = accumops.replace_batchnorm_layers(plain)  # a copy, with the same weights
    for name, net in (("Keras", plain), ("accumops", swapped)):
        losses, error = train(net, images, labels)
        print(f"{name:9s} losses {losses[0]:.3f} to {losses[-1]:.3f}, running variance off by {error:.1e} of its move")
    steps = accumops.memory_profile(swapped, [MICRO, BATCH], measure=False).steps
    small, large = (step.predicted / 2**20 for step in steps)
    print(f"a step of {MICRO} images takes {small:.0f} MiB, of {BATCH} {large:.0f} MiB")


if __name__ == "__main__":
    main()
