"""How a `GradientAccumulateModel` is written to files and made again."""

from typing import Any

import keras

from accumops.training.wrapper import Wrapper, wrap_as_layer

_PLAIN_ARGUMENTS = ("memory_limit", "parallel_micro_batches", "loss_over", "partial_window", "lazy_sparse")


class ConfiguredWrapper(Wrapper):
    """A wrapper whose arguments, and those of its `compile`, go into files."""

    accum_steps: Any
    micro_batch_size: Any
    finds_micro_batch: bool
    """Whether the micro-batch was given as `"auto"`."""
    whole_inputs: tuple[str | int, ...]
    normalization: Any
    gradient_clipping: Any

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, with the optimizer that was given: `compile` wraps it anew."""
        config: dict[str, Any] = super().get_compile_config()
        if config:
            config["optimizer"] = keras.saving.serialize_keras_object(self.optimizer.inner_optimizer)
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this model again, without its weights."""
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            "shares_graph": self.shares_graph,
            "accum_steps": keras.saving.serialize_keras_object(_with_keys_of_json(self.accum_steps)),
            "micro_batch_size": "auto" if self.finds_micro_batch else self.micro_batch_size,
            "whole_inputs": list(self.whole_inputs),
            "normalization": keras.saving.serialize_keras_object(self.normalization),
            "gradient_clipping": keras.saving.serialize_keras_object(self.gradient_clipping),
            **{name: getattr(self, name) for name in (*_PLAIN_ARGUMENTS, "check_loss", "nonfinite")},
        }

    @staticmethod
    def arguments_from_config(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the arguments of the constructor that are in what `get_config` returned."""
        config = dict(config)
        for key in ("model", "accum_steps", "normalization", "gradient_clipping"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        if isinstance(config["accum_steps"], dict):
            config["accum_steps"] = {int(epoch): steps for epoch, steps in config["accum_steps"].items()}
        if not config.pop("shares_graph", True):
            wrap_as_layer(config["model"])
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Makes a model from what `get_config` returned."""
        return cls(**cls.arguments_from_config(config, custom_objects))


def _with_keys_of_json(accum_steps: Any) -> Any:
    """The number of micro-batches a window as JSON can hold it: a dict with strings for epochs."""
    if not isinstance(accum_steps, dict):
        return accum_steps
    return {str(epoch): steps for epoch, steps in accum_steps.items()}
