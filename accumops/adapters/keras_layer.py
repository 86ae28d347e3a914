"""What accumops uses of Keras's layers beyond their public interface."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.upstream import relies_on, sample

_MIXED = "recompute in mixed precision"


@relies_on(
    "keras.src.backend.common.stateless_scope.in_stateless_scope()",
    feature="AccumBatchNormalization within `stateless_call`",
)
def in_stateless_scope() -> bool:
    """Whether a `keras.StatelessScope` is open. False where this cannot be told."""
    try:
        from keras.src.backend.common import stateless_scope
    except ImportError:
        return False
    return bool(stateless_scope.in_stateless_scope())


@relies_on(
    "keras.Layer._flatten_layers(include_self=, recursive=)",
    feature="finding the layers of a model, and replace_batchnorm_layers",
)
def layers_within(layer: keras.Layer, *, include_self: bool = True, recursive: bool = True) -> list[keras.Layer]:
    """The layers of a layer or model, those nested in them included.

    Args:
        layer: The layer or model.
        include_self: Whether it is the first of them.
        recursive: Whether to look into the layers that are found, too.
    """
    return list(layer._flatten_layers(include_self=include_self, recursive=recursive))


_WITH_ACTIVATION = (
    *(keras.layers.Dense, keras.layers.EinsumDense, keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
)


def activation_of(layer: Any) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """The function that a layer of Keras's own applies last, to its product and bias; None if there is none.

    An activation that is a layer itself does not count.
    """
    activation = layer.activation if type(layer) in _WITH_ACTIVATION else None
    return None if activation is keras.activations.linear or isinstance(activation, keras.Layer) else activation


@contextlib.contextmanager
def with_activation(layer: keras.Layer, activation: Callable[[tf.Tensor], tf.Tensor]) -> Iterator[None]:
    """Has a layer apply another function last, within a block."""
    before = layer.activation
    # Not `setattr`: Keras would look at what is set.
    object.__setattr__(layer, "activation", activation)
    try:
        yield
    finally:
        object.__setattr__(layer, "activation", before)


class ExtraCheckpointState(keras.Layer):
    """A base class for layers with state that `tf.train.Checkpoint` saves and a SavedModel does not.

    A subclass sets `checkpoint_state`, a `tf.train.experimental.PythonState`.
    """

    checkpoint_state: tf.train.experimental.PythonState

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        children: dict[str, Any] = super()._trackable_children(save_type, **kwargs)
        if save_type != "checkpoint":
            children.pop("checkpoint_state", None)
        return children


@sample("<a layer>")
def _layer() -> Any:
    return keras.layers.Dense(1)


@relies_on("<a layer>._loss_ids", feature="recompute of layers that add losses")
def layer_that_added(loss: tf.Tensor, layers: Sequence[keras.Layer]) -> keras.Layer | None:
    """The one of some layers that has added a loss within a `keras.StatelessScope`."""
    return next((layer for layer in layers if id(loss) in layer._loss_ids), None)


@relies_on("keras.Layer._get_regularization_losses()", feature="losses over the window")
def regularization_losses(layer: keras.Layer) -> list[tf.Tensor]:
    """The losses of the regularizers of a layer's trainable variables."""
    return list(layer._get_regularization_losses())


@contextlib.contextmanager
@relies_on("keras.src.backend.common.global_state.set_global_attribute(name, value)", feature=_MIXED)
@relies_on("keras.src.backend.common.global_state.get_global_attribute(name)", feature=_MIXED)
def without_autocast() -> Iterator[None]:
    """Has variables keep their own dtype in a block, whatever dtype the layer that is being called computes in."""
    from keras.src.backend.common import global_state

    # An `AutocastScope(None)` would not do: in it, variables seem to have the dtype of `keras.config.floatx()`.
    scope = global_state.get_global_attribute("autocast_scope")
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", scope)


def values_of(variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """The values of variables in their own dtype."""
    with without_autocast():
        return [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]


@sample("<a stateless scope>")
def _stateless_scope() -> Any:
    scope = keras.StatelessScope()
    with scope:
        return scope


@relies_on("<a stateless scope>.original_scope", feature="recompute within `stateless_call` and losses over the window")
def _scope_around(scope: keras.StatelessScope) -> keras.StatelessScope | None:
    return scope.original_scope


class StateRecorder(keras.StatelessScope):
    """A `keras.StatelessScope` that collects losses, and records assignments to variables that are not its state.

    Args:
        state: Pairs of a variable and its value.
        values: Pairs of another variable and the value to read.
    """

    def __init__(
        self,
        state: Sequence[tuple[keras.Variable, tf.Tensor]],
        values: Sequence[tuple[keras.Variable, tf.Tensor]] = (),
    ) -> None:
        with without_autocast():  # the base class casts values to the dtypes that the variables seem to have
            super().__init__([*state, *values], collect_losses=True)
        self._known = {id(variable) for variable, _ in state}
        self.unknown: list[tuple[keras.Variable, str]] = []
        """Other variables that were assigned, and the scope of names where."""
        self.read: dict[int, keras.Variable] = {}
        """The variables that were read, by their id."""

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        """Returns the value of a variable, or None if this scope and those around it have none."""
        self.read[id(variable)] = variable
        value = super().get_current_value(variable)
        around = _scope_around(self)
        return around.get_current_value(variable) if value is None and around is not None else value

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Is called for each assignment, with the variable and its new value."""
        variable, _ = update
        if id(variable) not in self._known:
            scope = "" if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_name_scope()
            self.unknown.append((variable, scope))
        super().add_update(update)

    def value_of(self, variable: keras.Variable) -> tf.Tensor:
        """The value of a variable now."""
        return self.get_current_value(variable)
