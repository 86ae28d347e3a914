"""Classifies texts with a large table of embeddings, of which a batch touches few rows.

    python examples/text_with_sparse_embeddings.py

The texts are made here: each has words of its topic among words of all topics, and a word is one of 100,000 tokens by
its hash, so that no vocabulary is needed. Three trainings with the same effective batch of 256 in micro-batches of 32:

    Keras          the batch at once: Adam squares a row's sparse gradients one by one, and moves the whole table
    window         accumops: gradients stay sparse until the update, which is Adam's of the dense gradient
    lazy_sparse    accumops: rows that no text of the window has stay as they are, which is another algorithm

It prints the accuracy on other texts, the time of an update, and how many rows of the table the last update has moved.
"""

import time

import keras
import numpy as np

import accumops

ROWS, WIDTH, WORDS, TOPICS, BATCH, MICRO = 100_000, 64, 20, 8, 256, 32


def make_texts(number, seed):
    """Returns texts as rows of tokens, and their topics."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(0, TOPICS, number)
    common = rng.zipf(1.2, (number, WORDS)).clip(max=20_000)  # a few words often, most of them rarely
    own = 20_000 + 200 * topics[:, None] + rng.integers(0, 200, (number, WORDS))
    words = np.where(rng.random((number, WORDS)) < 0.15, own, common)
    return (words * 2_654_435_761 % 2**32 % ROWS).astype("int32"), topics


def make_net():
    """Returns the mean of the words' embeddings and a dense layer, the same each time."""
    keras.utils.set_random_seed(0)
    table = keras.layers.Embedding(ROWS, WIDTH, name="table")
    pooling = keras.layers.GlobalAveragePooling1D()
    return keras.Sequential([keras.Input((WORDS,), dtype="int32"), table, pooling, keras.layers.Dense(TOPICS)])


def main():
    """Trains in the three ways, and prints what each reaches."""
    texts, topics = make_texts(4096, seed=0)
    test = make_texts(1000, seed=1)
    ways = {
        "Keras": lambda net: net,
        "window": lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=MICRO),
        "lazy_sparse": lambda net: accumops.GradientAccumulateModel(net, micro_batch_size=MICRO, lazy_sparse=True),
    }
    for name, wrap in ways.items():
        net = make_net()
        model = wrap(net)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
        model.train_on_batch(texts[:BATCH], topics[:BATCH])  # traces
        begin = time.perf_counter()
        model.fit(texts, topics, batch_size=BATCH, epochs=3, shuffle=False, verbose=0)
        milliseconds = 1e3 * (time.perf_counter() - begin) / (3 * len(texts) / BATCH)
        _, accuracy = model.evaluate(*test, verbose=0)
        before = net.get_layer("table").get_weights()[0]
        model.train_on_batch(texts[:BATCH], topics[:BATCH])
        moved = np.any(net.get_layer("table").get_weights()[0] != before, axis=1).sum()
        print(f"{name:12s} accuracy {accuracy:.3f}   {milliseconds:5.1f} ms an update, which moves {moved} rows")
    tokens, of_batch = len(np.unique(texts)), len(np.unique(texts[:BATCH]))
    print(f"the texts have {tokens} different tokens, and the last batch {of_batch}, in a table of {ROWS} rows")


if __name__ == "__main__":
    main()
