"""Where the moments go that calls of batch normalization layers add: what those who run the calls say about it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from accumops.adapters.keras_layer import in_stateless_scope
from accumops.normalization.layer_window import LayerWindow

# Called with each layer by the model whose step is running or being traced. A context variable, since each replica has
# a thread and threads switch at every collective.
_ADOPT: contextvars.ContextVar[Callable[[Any], LayerWindow] | None] = contextvars.ContextVar("adopt", default=None)


@contextlib.contextmanager
def owning_windows(adopt: Callable[[Any], LayerWindow]) -> Iterator[None]:
    """Leaves it to a model to end the windows of all layers that are called while the block runs or is traced.

    Args:
        adopt: Called with a layer each time it is called; returns the window that the layer adds its moments to.
    """
    token = _ADOPT.set(adopt)
    try:
        yield
    finally:
        _ADOPT.reset(token)


def adopting() -> Callable[[Any], LayerWindow] | None:
    """What `owning_windows` was given, or None outside of its blocks."""
    return _ADOPT.get()


# Whether layers add moments to windows that others end: None leaves it to how they are called.
_COLLECTS: contextvars.ContextVar[bool | None] = contextvars.ContextVar("collects", default=None)


@contextlib.contextmanager
def collecting_moments(collects: bool | None) -> Iterator[None]:
    """Says whether layers that are called while the block runs or is traced add moments to windows that others end.

    Of several runs over the same inputs one has to. It may be in a `keras.StatelessScope`. None leaves it to how they
    are called.
    """
    token = _COLLECTS.set(collects)
    try:
        yield
    finally:
        _COLLECTS.reset(token)


def collects_as_told() -> bool | None:
    """What `collecting_moments` was given, or None outside of its blocks."""
    return _COLLECTS.get()


def collects_moments() -> bool | None:
    """Whether layers that are called now add moments to windows that others end, as `collecting_moments` takes it."""
    collects = _COLLECTS.get()
    return True if collects is None and not in_stateless_scope() else collects
