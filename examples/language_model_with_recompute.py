"""Fine-tunes a small language model by LoRA, in micro-batches, and computes its activations again.

    python examples/language_model_with_recompute.py

The model predicts the next character of the Zen of Python, which Python itself has. First it is trained as a whole.
Then all of it is frozen but the LoRA matrices and the biases of its dense layers (`enable_lora`), and it is fine-
tuned on the text in upper case. Both trainings take 64 sequences an update in micro-batches of 8, and
`recompute_layers` keeps one activation a block. The script prints the losses, how many values are trained, and the
memory of activations.
"""

import codecs
import contextlib
import io

import keras
import numpy as np

import accumops

with contextlib.redirect_stdout(io.StringIO()):  # the module prints its text
    import this

LENGTH, WIDTH, HEADS, BLOCKS, BATCH, MICRO = 48, 64, 4, 4, 64, 8
ZEN = codecs.decode(this.s, "rot13")
CHARACTERS = sorted(set(ZEN + ZEN.upper()))


def make_data(text):
    """Returns all sequences of a text as numbers, and the characters that follow each of theirs."""
    numbers = np.array([CHARACTERS.index(each) for each in text], "int32")
    windows = np.lib.stride_tricks.sliding_window_view(numbers, LENGTH + 1)
    return windows[:, :-1], windows[:, 1:]


def make_net():
    """Returns a decoder: embedded characters and positions, and pre-norm blocks of attention and dense layers."""
    layers = keras.layers
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(len(CHARACTERS), WIDTH)(inputs) + layers.Embedding(LENGTH, WIDTH)(positions)
    for i in range(BLOCKS):
        normed = layers.LayerNormalization()(x)
        attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normed, normed, use_causal_mask=True)
        x = layers.Add()([x, layers.Dropout(0.1)(attended)])
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add(name=f"block_{i}")([x, layers.Dense(WIDTH)(hidden)])
    return keras.Model(inputs, layers.Dense(len(CHARACTERS))(layers.LayerNormalization()(x)))


def train(net, text, learning_rate, epochs):
    """Trains a network on a text, and prints the first and the last loss."""
    model = accumops.GradientAccumulateModel(net, micro_batch_size=MICRO)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(learning_rate), loss)
    losses = model.fit(*make_data(text), batch_size=BATCH, epochs=epochs, verbose=0).history["loss"]
    trained = sum(int(np.prod(each.shape)) for each in net.trainable_variables)
    print(f"{trained:7d} values trained, loss {losses[0]:.3f} to {losses[-1]:.3f}")


def main():
    """Trains, fine-tunes, and prints memory."""
    keras.utils.set_random_seed(0)
    net = make_net()
    accumops.recompute_layers(net, segments=[f"block_{i}" for i in range(BLOCKS)])
    train(net, ZEN, 3e-3, epochs=4)
    for layer in net.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(4)  # freezes the kernel
        else:
            layer.trainable = False
    train(net, ZEN.upper(), 1e-2, epochs=4)
    steps = accumops.memory_profile(net, BATCH, measure=False).steps
    kept, recomputed = (step.activations / 2**20 for step in steps)
    print(f"activations of {BATCH} sequences: {kept:.1f} MiB kept, {recomputed:.1f} MiB recomputed")


if __name__ == "__main__":
    main()
