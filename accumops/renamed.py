"""What other libraries call otherwise: their names and arguments, and errors that say what to write here.

`docs/coming_from.md` has the same as tables, with what differs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

NAMES: dict[str, str] = {
    "accumops.GAModelWrapper": "accumops.GradientAccumulateModel",
    "accumops.GAOptimizerWrapper": "accumops.GradientAccumulateOptimizer",
    "accumops.accumulators": "accumops.GradientAccumulateModel or accumops.GradientAccumulateOptimizer",
    "accumops.agc": "accumops.AdaptiveGradientClipping",
    "accumops.adaptive_clip_grad": "accumops.AdaptiveGradientClipping",
    "accumops.compute_norm": "accumops.AdaptiveGradientClipping, which takes norms itself",
    "accumops.unitwise_norm": "accumops.AdaptiveGradientClipping, which takes norms itself",
    "accumops.utils": "accumops.replace_batchnorm_layers",
    "accumops.layers.AccumBatchNormalization": "accumops.AccumBatchNormalization",
    "accumops.GradientAccumulationScheduler": "accumops.AccumStepsScheduler",
    "accumops.MultiSteps": "accumops.GradientAccumulateOptimizer",
    "accumops.recompute_grad": "accumops.recompute",
    "accumops.remat": "accumops.recompute",
    "accumops.RematScope": "accumops.recompute_layers",
}
"""What other libraries call otherwise, by module and name, and what to use instead."""

_ACCUM_STEPS = dict.fromkeys(
    (
        "accumulate_grad_batches",
        "accumulation_steps",
        "backward_passes_per_step",
        "every_k_schedule",
        "grad_accum_steps",
        "gradient_accumulation_steps",
        "iter_size",
        "n_gradients",
        "num_accumulation_steps",
        "update_freq",
    ),
    "write `accum_steps=`, the number of micro-batches in a window",
)
_MICRO_BATCH_SIZE = dict.fromkeys(
    ("microbatch_size", "minibatch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    "write `micro_batch_size=`, the number of samples in a micro-batch",
)
_CLIPPING = dict.fromkeys(
    ("agc", "clip_factor", "eps", "use_agc"),
    "write `gradient_clipping=accumops.AdaptiveGradientClipping(clip_factor=0.01, epsilon=1e-3)`",
)
_PRECISION_AND_REPLICAS = {
    "mixed_precision": "leave it out. `compile` adds a LossScaleOptimizer where the dtype policy is mixed_float16",
    "experimental_distributed_support": "leave it out, and create model and optimizer within `strategy.scope()`",
}
_REDUCTION = dict.fromkeys(
    ("average_aggregated_gradients", "use_grad_mean"), "write `reduction=`, which is 'mean' or 'sum'"
)
_NONFINITE = {
    "should_skip_update_fn": "write `nonfinite='skip'`, which leaves out micro-batches with Inf or NaN",
}
_OF_THE_WRAPPED_OPTIMIZER = dict.fromkeys(
    (
        "clipnorm",
        "clipvalue",
        "decay",
        "ema_momentum",
        "ema_overwrite_frequency",
        "global_clipnorm",
        "learning_rate",
        "loss_scale_factor",
        "lr",
        "use_ema",
        "weight_decay",
    ),
    "give it to the optimizer that is wrapped",
)

ARGUMENTS: dict[str, dict[str, str]] = {
    "AccumBatchNormalization": _ACCUM_STEPS,
    "AccumStepsScheduler": {"scheduling": "write `schedule=`"},
    "AdaptiveGradientClipping": {"eps": "write `epsilon=`"},
    "GradientAccumulateModel": {
        **_ACCUM_STEPS,
        **_MICRO_BATCH_SIZE,
        **_CLIPPING,
        **_PRECISION_AND_REPLICAS,
        **_NONFINITE,
        **dict.fromkeys(
            ("average_aggregated_gradients", "reduction", "use_grad_mean"),
            "give the loss of `compile` a reduction, 'sum_over_batch_size' or 'sum', which the window follows",
        ),
        **dict.fromkeys(
            ("batch_size", "effective_batch_size", "train_batch_size"),
            "give `batch_size` to `fit`, and here `micro_batch_size=`",
        ),
        **dict.fromkeys(("optimizer", *_OF_THE_WRAPPED_OPTIMIZER), "give `compile` an optimizer that has it"),
        "optimizer": "give it to `compile`",
    },
    "GradientAccumulateOptimizer": {
        **_ACCUM_STEPS,
        **dict.fromkeys(
            ("micro_batch_size", *_MICRO_BATCH_SIZE),
            "an optimizer gets micro-batches as they come. Use accumops.GradientAccumulateModel, which splits batches",
        ),
        **_CLIPPING,
        **_PRECISION_AND_REPLICAS,
        **_REDUCTION,
        **_NONFINITE,
        **_OF_THE_WRAPPED_OPTIMIZER,
        **dict.fromkeys(("opt", "optimizer"), "write `inner_optimizer=`, or give it as the first argument"),
    },
    "GradientAccumulator": {**_ACCUM_STEPS, **_REDUCTION, **_NONFINITE},
    "recompute_layers": {
        "layer_names": "write `segments=`, the names of layers behind which the model is cut",
        **dict.fromkeys(
            ("mode", "output_size_threshold"),
            "write `policy='cheap'`, `segments=` or `memory=`, which say what is computed again",
        ),
    },
    "replace_batchnorm_layers": {
        **_ACCUM_STEPS,
        "position": "leave it out. New layers always take the place of the old ones",
    },
}
"""Arguments of other libraries, by the name of what is called here, and what to do instead."""


def missing_name(module: str, name: str) -> AttributeError | ImportError:
    """Returns the error for a name that a module does not have, to be raised by the module's `__getattr__`.

    It is an AttributeError. `from module import name` would replace that by an error with a text of its own, so there
    it is an ImportError.

    Args:
        module: The module's full name.
        name: The name that was asked for.
    """
    message = f"module {module!r} has no attribute {name!r}"
    instead = NAMES.get(f"{module}.{name}")
    if instead is None:
        return AttributeError(message)
    message += f". Use {instead}."
    frame = inspect.currentframe()
    for _ in range(2):  # this function, and the module's `__getattr__`
        frame = None if frame is None else frame.f_back
    imports = frame is not None and frame.f_globals.get("__name__") == "importlib._bootstrap"
    return ImportError(message, name=module) if imports else AttributeError(message)


def explains_renamed(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Has a function, or the `__init__` of a class, say what to write instead of arguments of other libraries.

    Raises:
        TypeError: When the function is called with an argument that `ARGUMENTS` has for it.
    """
    called = function.__qualname__.removesuffix(".__init__")
    instead = ARGUMENTS[called]

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        given: dict[str, list[str]] = {}
        for name in kwargs:
            if name in instead:
                given.setdefault(instead[name], []).append(f"`{name}`")
        if given:
            raise TypeError(" ".join(f"{called} takes no {', '.join(names)}: {what}." for what, names in given.items()))
        return function(*args, **kwargs)

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # Keras does not look behind it
    return call
