"""Methods of an optimizer replaced while its `apply` runs or is traced."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import keras

LOCK = threading.RLock()
"""Held while attributes are replaced; and by who looks at them before, so as not to find another thread's."""


@contextlib.contextmanager
def overriding(optimizer: keras.optimizers.Optimizer, **replacements: Any) -> Iterator[None]:
    """Replaces attributes of one optimizer, beside what Keras tracks: they are not the optimizer's state.

    Args:
        optimizer: The optimizer.
        **replacements: Its attributes for as long as the block lasts, by name.
    """
    attributes = vars(optimizer)
    with LOCK:
        before = {name: attributes[name] for name in replacements if name in attributes}
        attributes.update(replacements)
        try:
            yield
        finally:
            for name in replacements:
                del attributes[name]
            attributes.update(before)
