"""Checks an installed accumops: python wheel_check.py {fused,reference}. Needs nothing of the source tree.

A small model trains with the full batch in plain Keras, and with micro-batches by each backend; `accumops info` and
`accumops verify --quick` run. Prints how long it takes from the start of Python to the first update.
"""

import os
import subprocess
import sys
import time
import warnings

START = time.perf_counter()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def train(wrap: bool) -> list:
    """Returns the weights after two epochs, and the seconds to the first update."""
    import keras
    import numpy as np

    import accumops

    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 28, 28, 1)).astype("float32"), rng.integers(0, 10, 64)
    model = accumops.GradientAccumulateModel(net, micro_batch_size=8) if wrap else net
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss=loss)
    first = None
    for _ in range(2):
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        first = first or time.perf_counter() - START
    return [*(weight.numpy() for weight in net.weights), first]


def main(expected: str) -> None:
    """Runs the checks. `expected` is what the backend "auto" has to choose."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        *found, seconds = train(wrap=True)
    import numpy as np
    import tensorflow as tf

    import accumops

    info = accumops.build_info()
    told = [str(each.message) for each in caught if "plain TensorFlow" in str(each.message)]
    assert info["loaded"] == (expected == "fused"), info
    assert len(told) == (expected == "reference"), told
    for each in told:
        print("warned:", each)
    *plain, _ = train(wrap=False)
    accumops.set_backend("reference")
    *by_reference, _ = train(wrap=True)
    for arrays in (found, by_reference):
        for array, wanted in zip(arrays, plain, strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)
    command = os.path.join(os.path.dirname(sys.executable), "accumops")
    subprocess.run([command, "info"], check=True, stdout=subprocess.DEVNULL)
    if expected == "fused":
        subprocess.run([command, "verify", "--quick"], check=True, stdout=subprocess.DEVNULL)
    print(f"TensorFlow {tf.__version__}: {expected}, as expected; {seconds:.1f} s to the first update")


if __name__ == "__main__":
    main(sys.argv[1])
