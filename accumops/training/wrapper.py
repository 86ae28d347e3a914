"""A model around a model.

A model whose graph Keras knows (functional, or a `keras.Sequential` that knows its input) is wrapped by a functional
model over the same graph: it has the same `inputs`, `outputs` and `layers`, its files of weights are those of the
wrapped model, and tools that look for a functional model find one. Any other model, such as a subclassed one, is
wrapped by a model that has it as its one layer, and calls it.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from accumops.adapters.keras_functional import (
    ClonedWithItsClass,
    functional_class,
    graph_of,
    run_as,
    share_registered_name,
)
from accumops.adapters.keras_model import WrapperModel, mark_built, pass_inputs_on
from accumops.adapters.untracked import Untracked


class Wrapper(WrapperModel):
    """A model that has another, as its attribute `model`.

    Args:
        model: The model to wrap.
        name: The name of this model.
    """

    def __init__(self, model: keras.Model, name: str | None) -> None:
        if has_graph(model):
            # As Keras itself does for subclasses of `keras.Model` that are called with inputs and outputs; but there,
            # all models of the class become functional.
            self.__class__ = _functional_version(type(self))  # type: ignore[arg-type]
            _wrap_graph(self, model, name)
            return
        # Inputs reach the wrapped model as they are, and it casts them itself.
        super().__init__(name=name, autocast=False)
        pass_inputs_on(self)
        self.model = model
        if hasattr(model, "output_names"):  # Keras finds losses and metrics by them, and names them so in the logs
            self.output_names = model.output_names
        if model.built:
            mark_built(self, like=model)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Calls the wrapped model."""
        return self.model(inputs, training=training)

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped model if it has a `build`; otherwise its first call builds it."""
        if not self.model.built and input_shape is not None and type(self.model).build is not keras.Model.build:
            self.model.build(input_shape)
        self.built = True

    @property
    def losses(self) -> list[Any]:
        """Losses of layers (`add_loss`) and regularizers, of the last call."""
        given: Untracked | None = self.__dict__.get("_given_losses")
        return super().losses if given is None else given.losses

    @contextlib.contextmanager
    def with_losses(self, losses: Sequence[tf.Tensor]) -> Iterator[None]:
        """Has `losses` return what is given, while the block runs or is traced."""
        self.__dict__["_given_losses"] = Untracked(losses=list(losses))
        try:
            yield
        finally:
            del self.__dict__["_given_losses"]

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the wrapped model, whose inference is this model's.

        Args:
            filepath: Where to export it.
            *args: As `keras.Model.export` takes them.
            **kwargs: As `keras.Model.export` takes them: `format`, `verbose`, `input_signature`, …
        """
        self.model.export(filepath, *args, **kwargs)

    def get_layer(self, name: str | None = None, index: int | None = None) -> keras.Layer:
        """Returns a layer by its name or index, as `keras.Model.get_layer` does.

        Raises:
            ValueError: If there is none. The layers of a subclassed model are those of `model.model`.
        """
        try:
            return super().get_layer(name, index)
        except ValueError as error:
            raise ValueError(f"{error}{self._hint('get_layer')}") from None

    @property
    def shares_graph(self) -> bool:
        """Whether this model is a functional one over the graph of the wrapped model."""
        return isinstance(self, _FunctionalWrapper)

    @staticmethod
    def arguments_from_config(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the arguments of the constructor that are in what `get_config` returned."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        message = f"'{type(self).__name__}' object has no attribute '{name}'"
        if not name.startswith("_") and "model" in vars(self):
            message += self._hint(name)
        raise AttributeError(message, name=name, obj=self)

    def _hint(self, name: str) -> str:
        """Says where to look for what only the wrapped model has."""
        if isinstance(self, _FunctionalWrapper) or not hasattr(self.model, name):
            return ""
        return f". It wraps a {type(self.model).__name__} and does not look into it: use `model.model.{name}`"


class _FunctionalWrapper(ClonedWithItsClass):
    """What a wrapper with a graph does in place of `Wrapper`. `_functional_version` puts it before a class of wrappers.

    The wrapper and the wrapped model share one graph, and so the same layers and variables.
    """

    plain_class: type[Wrapper]
    """The class that this one is a functional version of."""
    untracked_model: Untracked
    outputs: list[keras.KerasTensor]  # Keras's property

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        original = self.original_of(args[1]) if len(args) == 2 else None
        if original is not None:  # `keras.models.clone_model` has made its layers anew
            model = keras.Model(*args, name=original.model.name)
            args, kwargs = (), {**original.arguments_from_config(original.get_config()), **kwargs, "model": model}
        super().__init__(*args, **kwargs)

    def _run_through_graph(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph as the wrapped model does: perhaps in segments that are recomputed."""
        return run_as(graph_of(self.model), super()._run_through_graph, inputs, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle looks classes up by name.
        reduced: Any = super().__reduce__()
        return (getattr(self.plain_class, reduced[0].__name__), *reduced[1:])

    @property
    def model(self) -> keras.Model:
        """The wrapped model. Keras finds its layers in this model, and need not find them again."""
        return self.untracked_model.model

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers of the wrapped model."""
        return self.model.layers

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.export`."""
        keras.Model.export(self, filepath, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any) -> Any:
        """Calls the layers of the wrapped model."""
        if self.model.outputs[0] is not self.outputs[0]:
            raise ValueError(
                f"The layers of '{self.model.name}' changed after it was wrapped. Wrap and compile it again."
            )
        return functional_class().call(self, inputs, training=training, mask=mask, **kwargs)


# A Sequential that is wrapped before it knows its input stays a layer of its wrapper, in files too. When such a file is
# loaded, the Sequential knows its input at once.
_LAYERS: weakref.WeakSet[keras.Model] = weakref.WeakSet()


def wrap_as_layer(model: keras.Model) -> None:
    """Has a model wrapped as a layer, although its graph is known."""
    _LAYERS.add(model)


def has_graph(model: keras.Model) -> bool:
    """Whether calls of a model are nothing but runs through a graph of layers that Keras knows."""
    if model in _LAYERS or not isinstance(model, keras.Sequential | keras.Function):
        return False
    if not all(method.__module__.startswith("keras.") for method in (type(model).call, type(model).__call__)):
        return False
    try:
        return bool(model.outputs)
    except AttributeError:  # a Sequential that has not been built
        return False


def _wrap_graph(wrapper: Any, model: keras.Model, name: str | None) -> None:
    """Makes a wrapper a functional model over the graph of a model."""
    wrapper.untracked_model = Untracked(model=model)
    if isinstance(model, keras.Sequential):
        inputs, outputs = model.inputs[0], model.outputs[0]
    else:
        inputs, outputs = model.input, model.output
    functional_class().__init__(wrapper, inputs, outputs, name=name, trainable=model.trainable)
    wrapper.dtype_policy = model.dtype_policy


@functools.cache
def _functional_version(kind: type[Wrapper]) -> type[Wrapper]:
    """Returns a class of wrappers whose objects are functional models, under the name of another class of wrappers."""
    if issubclass(kind, _FunctionalWrapper):
        return kind
    functional = type(
        kind.__name__,
        (_FunctionalWrapper, kind, functional_class()),
        {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "plain_class": kind,
        },
    )
    share_registered_name(kind, functional)
    return functional
