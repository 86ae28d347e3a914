"""A functional or Sequential model made again with layers of another class.

A model is rebuilt, not edited. Its graph, and each graph nested in it, is run through once with new layers, each made
from the config of an old one. Then all state is copied.
"""

import inspect
import tempfile
import types
import warnings
from typing import Any

import keras
import numpy as np

from accumops.adapters.keras_functional import (
    copy_path,
    copy_recompute_mode,
    copy_without_graph,
    inputs_of,
    layers_with_input,
    run_through,
    seed_generators,
    source_of,
)
from accumops.adapters.keras_layer import layers_within

# The methods of a model that Keras runs: a class that overrides one of them is not to be lost silently.
_RUN_METHODS = ("call", "train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


class Rebuilder:
    """Makes models again, with layers of one class made as another.

    Args:
        source: The class of the layers that are replaced.
        target: The class of the layers that replace them.
        **arguments: Arguments of their constructor beside those in the config of the replaced layer.
    """

    def __init__(self, source: Any, target: Any, **arguments: Any) -> None:
        self._source, self._target, self._arguments = source, target, arguments
        sample = target(**arguments)  # raises an error for a wrong argument
        self._known = set(sample.get_config())
        self._source_class = _class_entries(keras.saving.serialize_keras_object(source()))
        self._target_class = _class_entries(keras.saving.serialize_keras_object(sample))
        # Layers and other operations with their counterparts, by id: what occurs several times is made once.
        self._made: dict[int, tuple[Any, Any]] = {}

    def run(self, model: keras.Model) -> keras.Model:
        """Returns the new model."""
        self._check(model)
        rebuilt = self._counterpart(model)
        copies = {key: copy for key, (original, copy) in self._made.items() if isinstance(original, keras.Layer)}
        leaves = [self._made[key] for key in copies if not _has_graph(self._made[key][0])]
        for original, copy in leaves:
            for part, its_copy in self._copy_state(original, copy):
                if copies.setdefault(id(part), its_copy) is not its_copy:
                    raise ValueError(
                        f"The layer '{part.name}' is used in several places, one of them within '{original.name}' "
                        f"({type(original).__name__}), whose config has a layer of its own there: it cannot stay one."
                    )
        for original in _parents_first(model):  # setting `trainable` sets it in all layers within
            if id(original) not in copies:
                raise ValueError(f"'{model.name}' has the layer '{original.name}' outside its graph.")
            copy = copies[id(original)]
            copy.trainable = original.trainable
            if _has_graph(original):
                _build_as(original, copy)
                copy.dtype_policy = original.dtype_policy
        for original, copy in leaves:
            for before, after in zip(original.weights, copy.weights, strict=True):
                after.trainable = before.trainable
        _check_variables(model, rebuilt)
        return rebuilt

    def _check(self, model: keras.Model) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a functional or Sequential keras.Model. Received: {model!r}")
        registered = [keras.saving.get_registered_name(kind) for kind in type(model).__mro__]
        if "accumops>GradientAccumulateModel" in registered:  # by its name: the class is in a layer above
            raise ValueError(
                f"'{model.name}' is a GradientAccumulateModel: give the model that it wraps, its `model`, and wrap the "
                "new one."
            )
        if not _has_graph(model):
            raise ValueError(
                f"'{model.name}' is a subclassed model, whose layers only the code of {type(model).__name__} knows: "
                f"there, use {self._target.__name__} instead of {self._source.__name__}."
            )

    def _counterpart(self, operation: Any) -> Any:
        """Returns the layer or other operation of the new model that stands for one of the old model."""
        if id(operation) not in self._made:
            if isinstance(operation, keras.Sequential):
                made = self._sequential(operation)
            elif isinstance(operation, keras.Function):
                made = self._functional(operation)
            elif isinstance(operation, keras.Layer):
                made = self._layer(operation)
            else:
                made = copy_without_graph(operation)
            self._made[id(operation)] = operation, made
        return self._made[id(operation)][1]

    def _sequential(self, model: keras.Sequential) -> keras.Sequential:
        kind = _model_class(model, keras.Sequential, ("layers",))
        return kind(layers=[self._counterpart(layer) for layer in layers_with_input(model)], name=model.name)

    def _functional(self, model: keras.Function) -> keras.Function:
        def call(counterpart: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = keras.tree.map_structure(self._argument, (args, kwargs))
            return counterpart(*args, **kwargs)

        inputs = keras.tree.map_structure(self._input, inputs_of(model))
        outputs = run_through(model, inputs, self._counterpart, call)
        if not isinstance(model, keras.Model):
            return keras.Function(inputs, outputs, name=model.name)
        kind = _model_class(model, keras.Model, ("inputs", "outputs"))
        config = {}
        if kind is not keras.Model and not _is_of_keras(kind.get_config):
            of_keras = ("name", "trainable", "layers", "input_layers", "output_layers")
            config = {key: value for key, value in model.get_config().items() if key not in of_keras}
        return kind(inputs=inputs, outputs=outputs, name=model.name, **config)

    def _input(self, tensor: keras.KerasTensor) -> keras.KerasTensor:
        layer = source_of(tensor)
        if isinstance(layer, keras.layers.InputLayer):
            return self._counterpart(layer).output
        return keras.KerasTensor(tensor.shape, tensor.dtype, sparse=tensor.sparse, name=tensor.name)

    def _argument(self, value: Any) -> Any:
        """Returns an argument of an operation: a layer's variable is replaced by the variable of the new layer."""
        if not isinstance(value, keras.Variable):
            return value
        for original, copy in self._made.values():
            if isinstance(original, keras.Layer):
                for before, after in zip(original.weights, copy.weights, strict=False):
                    if before is value:
                        return after
        raise ValueError(
            f"The variable '{value.path}' is an operation's argument, but of no layer that is called before: what the "
            "new model is to use there cannot be told."
        )

    def _layer(self, layer: keras.Layer) -> keras.Layer:
        kind = self._target if type(layer) is self._source else type(layer)
        name = "accumops>rebuilt"
        objects = {name: kind, **_own_classes(layer)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
                config = layer.get_config()
            if kind is not type(layer):
                config = self._converted(config)
            if isinstance(layer, keras.layers.Lambda):
                config["mask"] = layer.mask  # Keras serializes it, but does not deserialize it
            parts = {part.name: part for part in reversed(layers_within(layer))}
            config = self._rewritten({"class_name": kind.__name__, "config": config}, parts, objects)
            config |= {"module": None, "registered_name": name}
            # "Not safe" for Keras, as the config may hold code. Here it is code that is running already.
            made = keras.saving.deserialize_keras_object(config, custom_objects=objects, safe_mode=False)
        except Exception as error:
            raise _not_rebuilt(layer, error) from error
        copy_recompute_mode(layer, made)
        return made

    def _rewritten(self, value: Any, parts: dict[str, keras.Layer], objects: dict[str, Any]) -> Any:
        """Returns a part of a layer's config with `target` for `source`, and without objects that the copy would share.

        Functions are put into `objects`, and the config names them: Keras does not find functions that are not
        registered, and cannot save lambdas with the variables that they use.

        Args:
            value: The part.
            parts: The layers within the layer, by name.
            objects: What Keras will find by name when it makes the layer.
        """
        if isinstance(value, keras.Layer):
            value = keras.saving.serialize_keras_object(value)
        if isinstance(value, list) or type(value) is tuple:
            values = [self._rewritten(each, parts, objects) for each in value]
            return tuple(values) if isinstance(value, tuple) else values
        if not isinstance(value, dict):
            return value
        if "class_name" in value and isinstance(value.get("config"), dict):
            # Layers are built when they are called, as the old ones were: the paths of their variables say where.
            value = {key: each for key, each in value.items() if key not in ("build_config", "compile_config")}
            if _class_entries(value) == self._source_class:
                value |= {**self._target_class, "config": self._converted(value["config"])}
            part = parts.get(value["config"].get("name"))
            if part is not None:
                value["config"] = {
                    key: _function_entry(each, part, key, objects) for key, each in value["config"].items()
                }
        return {key: self._rewritten(each, parts, objects) for key, each in value.items()}

    def _converted(self, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key in self._known} | self._arguments

    def _copy_state(self, original: keras.Layer, copy: keras.Layer) -> list[tuple[keras.Layer, keras.Layer]]:
        """Copies the state of a layer and of the layers within it, and returns these layers with their counterparts."""
        _build_as(original, copy)
        for part in layers_within(copy):
            if type(part) is self._source:
                raise ValueError(
                    f"The layer '{original.name}' makes its {self._source.__name__} '{part.name}' in the code of "
                    f"{type(original).__name__}: there, use {self._target.__name__}."
                )
        befores, afters = layers_within(original), layers_within(copy)
        wanted = [self._target if type(before) is self._source else type(before) for before in befores]
        if wanted != [type(after) for after in afters]:
            raise _not_rebuilt(original, "its copy has other layers within")
        pairs = list(zip(befores, afters, strict=True))
        for before, after in pairs:
            _build_as(before, after)
            if type(before) is type(after):
                _copy_own_state(before, after)
        shapes = [[(tuple(weight.shape), weight.dtype) for weight in layer.weights] for layer in (original, copy)]
        if shapes[0] != shapes[1]:
            raise _not_rebuilt(original, f"its weights are {shapes[0]}, those of its copy {shapes[1]}")
        for weight, its_copy in zip(original.weights, copy.weights, strict=True):
            its_copy.assign(weight)
            copy_path(weight, its_copy)  # it says where a layer was built; regular expressions may look for it
        for before, after in pairs:
            for seed, its_copy in zip(seed_generators(before), seed_generators(after), strict=True):
                its_copy.state.assign(seed.state)
        return pairs


def _has_graph(model: Any) -> bool:
    return isinstance(model, keras.Sequential | keras.Function)


def _is_of_keras(thing: Any) -> bool:
    return thing.__module__.partition(".")[0] == "keras"


def _class_entries(serialized: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a serialized object that name its class."""
    return {key: serialized.get(key) for key in ("module", "class_name", "registered_name")}


def _model_class(model: keras.Model, plain: type, arguments: tuple[str, ...]) -> Any:
    """Returns the class to make a model of: its own if the constructor takes the arguments that Keras's own take."""
    kind = type(model)
    if _is_of_keras(kind):
        return plain
    parameters = inspect.signature(kind.__init__).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    if set(arguments) <= parameters.keys() and ("name" in parameters or takes_any):
        return kind
    if takes_any and inspect.Parameter.VAR_POSITIONAL in kinds:
        return kind
    for name in _RUN_METHODS:
        if not _is_of_keras(getattr(kind, name)):
            raise ValueError(
                f"The new '{model.name}' would lose `{name}` of {kind.__name__}: its constructor must take "
                f"{', '.join(f'`{argument}`' for argument in arguments)} and `name` for it to be made again."
            )
    return plain


def _own_classes(layer: keras.Layer) -> dict[str, type]:
    """Returns the classes, by name, of layers, initializers and the like in a layer that are not Keras's own."""
    objects = [each for part in layers_within(layer) for each in (part, *vars(part).values())]
    kinds = {type(each) for each in objects if hasattr(type(each), "get_config")}
    return {keras.saving.get_registered_name(kind): kind for kind in kinds if not _is_of_keras(kind)}


def _function_entry(value: Any, layer: keras.Layer, key: str, objects: dict[str, Any]) -> Any:
    """Returns an entry of a layer's config; if it is for a function other than Keras's, one that `objects` has."""
    function = getattr(layer, key, None)
    if not isinstance(function, types.FunctionType):
        function = getattr(layer, f"_{key}", None)
    if not isinstance(function, types.FunctionType) or _is_of_keras(function):
        return value
    # If your function has the name of one of Keras's, Keras saves only the name and would load its own.
    if not isinstance(value, dict) and not (isinstance(value, str) and _is_of_keras(type(layer))):
        return value
    name = f"accumops>function_{len(objects)}"
    objects[name] = function
    return {"module": "builtins", "class_name": "function", "config": name, "registered_name": name}


def _build_as(original: keras.Layer, copy: keras.Layer) -> None:
    if original.built and not copy.built:
        config = original.get_build_config()
        if config:
            copy.build_from_config(config)


def _copy_own_state(original: keras.Layer, copy: keras.Layer) -> None:
    """Copies what a layer saves besides its weights, such as a vocabulary."""
    kind = type(original)
    if kind.load_own_variables is not keras.Layer.load_own_variables:
        store: dict[str, Any] = {}
        original.save_own_variables(store)
        copy.load_own_variables({key: np.asarray(value) for key, value in store.items()})
    if hasattr(kind, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            copy.load_assets(folder)


def _parents_first(model: keras.Model) -> list[keras.Layer]:
    """Returns all layers of a model and the model itself, each before those within it."""
    seen: set[int] = set()
    order: list[keras.Layer] = []

    def visit(layer: keras.Layer) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            for part in layers_within(layer, include_self=False, recursive=False):
                visit(part)
            order.append(layer)

    visit(model)
    return order[::-1]


def _check_variables(model: keras.Model, rebuilt: keras.Model) -> None:
    if len(model.weights) != len(rebuilt.weights):
        raise ValueError(
            f"'{model.name}' has {len(model.weights)} weights, and its copy {len(rebuilt.weights)}: only those of the "
            "layers in its graph are copied."
        )
    shared = {id(variable) for variable in model.variables} & {id(variable) for variable in rebuilt.variables}
    for variable in rebuilt.variables:
        if id(variable) in shared:
            raise ValueError(f"The copy of '{model.name}' shares '{variable.path}' with it, by a layer's config.")


def _not_rebuilt(layer: keras.Layer, reason: object) -> ValueError:
    return ValueError(
        f"The layer '{layer.name}' ({type(layer).__name__}) cannot be made again from its config: {reason}"
    )
