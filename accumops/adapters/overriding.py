"""Attributes of one object replaced while a block runs or is traced, such as the arithmetic of an optimizer."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

LOCK = threading.RLock()
"""Held while attributes are replaced. Hold it too to read what a replacement changes: another thread's may be in."""


@contextlib.contextmanager
def overriding(target: Any, **replacements: Any) -> Iterator[None]:
    """Replaces attributes of an object, and puts back what was there.

    Replacements go straight into the object's `__dict__`: Keras and TensorFlow do not track them, as they are no state.

    Args:
        target: The object.
        **replacements: Its attributes for as long as the block lasts, by name.
    """
    attributes = vars(target)
    with LOCK:
        before = {name: attributes[name] for name in replacements if name in attributes}
        attributes.update(replacements)
        try:
            yield
        finally:
            for name in replacements:
                del attributes[name]
            attributes.update(before)
