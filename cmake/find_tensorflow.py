"""Prints the headers, options and libraries of this interpreter's TensorFlow, which ops need, as JSON for CMake."""

import json
import os

import tensorflow as tf

library = tf.sysconfig.get_lib()
flags = [f for f in tf.sysconfig.get_compile_flags() if f.startswith("-D")]


def shared(name):
    """Returns the versioned file of a TensorFlow library, because the wheel has no link without a version."""
    found = sorted(f for f in os.listdir(library) if f.startswith(f"lib{name}.so"))
    if not found:
        raise SystemExit(f"{library} has no lib{name}.so: this TensorFlow is not one that ops can be built for.")
    return os.path.join(library, found[0])


print(
    json.dumps(
        {
            "version": tf.__version__,
            "include": tf.sysconfig.get_include(),
            "options": ";".join(flags),
            "libraries": ";".join(shared(name) for name in ("tensorflow_cc", "tensorflow_framework")),
        }
    )
)
