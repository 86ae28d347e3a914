"""What accumops relies on in Keras and TensorFlow without a promise of theirs, and what it costs when that is gone.

Each function of this package that uses a private name declares it:

    @relies_on("keras.optimizers.Optimizer._get_variable_index(variable)", feature="fused updates")
    def index_of(optimizer, variable): ...

`missing()` asks the installed Keras and TensorFlow for all of them, in about a second: it is the contract test, and
what `accumops info` shows. Where a name is gone, the function raises an `UpstreamError` that says which, instead of an
`AttributeError` from somewhere in a training step.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_SAMPLES: dict[str, Callable[[], Any]] = {}
_RELIED_ON: "list[PrivateName]" = []


class UpstreamError(RuntimeError):
    """The installed Keras or TensorFlow lacks a private name that a feature of accumops needs."""


@dataclasses.dataclass(frozen=True)
class PrivateName:
    """A name of Keras or TensorFlow that may go with any of their releases."""

    path: str
    """Where it is: a public class or module, or a sample in angle brackets, then the name."""
    parameters: tuple[str, ...] | None
    """What accumops calls it with; `name=` is given by its name. None if accumops does not call it."""
    feature: str
    """What does not work without it."""

    @property
    def name(self) -> str:
        """The name alone."""
        return self.path.rpartition(".")[2]

    def problem(self) -> str | None:
        """Says what is wrong with it in the installed versions, or returns None."""
        try:
            value = self._value()
        except (ImportError, AttributeError):
            return f"{_versions()} have no `{self.path}`, which accumops needs for {self.feature}"
        if self.parameters is None or not callable(value):
            return None
        try:
            keywords = {each.rstrip("="): None for each in self.parameters if each.endswith("=")}
            inspect.signature(value).bind(*(each for each in self.parameters if not each.endswith("=")), **keywords)
        except TypeError as error:
            return (
                f"`{self.path}` of {_versions()} does not take ({', '.join(self.parameters)}), as accumops calls it "
                f"for {self.feature}: {error}"
            )
        except ValueError:  # a builtin without a signature
            return None
        return None

    def _value(self) -> Any:
        owner, _, name = self.path.rpartition(".")
        if owner.startswith("<"):
            return getattr(_SAMPLES[owner](), name)
        parts = owner.split(".")
        for split in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:split]))
            except ImportError:
                continue
            for part in parts[split:]:
                found = getattr(found, part)
            value = getattr(found, name)
            # Without an object the first parameter is `self`.
            return functools.partial(value, None) if inspect.isclass(found) and inspect.isfunction(value) else value
        raise ImportError(owner)


def sample(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function that makes an object for names that only objects have, such as slots of an optimizer."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        _SAMPLES[name] = functools.cache(make)
        return make

    return register


def relies_on(*names: str, feature: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Declares the private names that a function uses, and has it raise an `UpstreamError` where one is gone.

    Args:
        *names: Each a path as in `PrivateName`, with the parameters in parentheses if accumops calls it.
        feature: What does not work without them.
    """
    declared = [_parse(name, feature) for name in names]
    _RELIED_ON.extend(declared)
    known = {each.name: each for each in declared}

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except AttributeError as error:
                if error.name not in known:
                    raise
                name = known[error.name]
                raise UpstreamError(
                    f"{_versions()} have no `{name.path}`, which accumops needs for {name.feature}. Install the "
                    "versions of Keras and TensorFlow that this release of accumops names, or a newer accumops."
                ) from error

        return call

    return decorate


def relied_on() -> list[PrivateName]:
    """Returns all private names that accumops relies on."""
    _import_rooms()
    return list(_RELIED_ON)


def missing() -> list[str]:
    """Says which private names the installed Keras and TensorFlow lack, and which feature each costs."""
    return [problem for name in relied_on() if (problem := name.problem()) is not None]


def _parse(name: str, feature: str) -> PrivateName:
    path, parenthesis, parameters = name.partition("(")
    names = tuple(each.strip() for each in parameters.rstrip(")").split(",") if each.strip())
    return PrivateName(path, names if parenthesis else None, feature)


def _import_rooms() -> None:
    for room in (
        "conditional_steps",
        "keras_functional",
        "keras_layer",
        "keras_losses",
        "keras_metrics",
        "keras_model",
        "keras_optimizer",
        "tensorflow",
    ):
        importlib.import_module(f"accumops.adapters.{room}")


def _versions() -> str:
    import keras
    import tensorflow as tf

    return f"Keras {keras.__version__} and TensorFlow {tf.__version__}"
