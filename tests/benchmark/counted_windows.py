"""What test_window_norm_suite.py has measured in another process, where TensorFlow's allocator counts."""

import tensorflow as tf

from accumops.benchmark.memory import peak_of_later_windows

MIB = 2**20


def peak():
    """The peak of windows that take 4 MiB, beside 16 MiB from before and 8 MiB that the first of them keeps."""
    held = []

    def prepare():
        held.append(tf.ones([16 * MIB // 4]) + 1.0)

        def window():
            if len(held) == 1:
                held.append(tf.ones([8 * MIB // 4]) + 1.0)
            tf.fill([4 * MIB // 4], 1.0)

        return window

    return peak_of_later_windows(prepare, "CPU")
