"""Keras's own tests of its optimizers, each within a GradientAccumulateOptimizer with windows of one micro-batch.

docs/keras_tests.md has the results.
"""

import inspect

import keras
from keras_tests import StandIn, keras_tests, over, test_cases

from accumops import GradientAccumulateOptimizer

KINDS = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "ftrl",
    "lamb",
    "lion",
    "loss_scale_optimizer",
    "multi_optimizer",
    "muon",
    "nadam",
    "optimizer",
    "optimizer_sparse",
    "rmsprop",
    "schedule_free_adamw",
    "sgd",
]
MODULES = {kind: (kind, keras.optimizers.Optimizer) for kind in KINDS} | {
    # Optimizers of optimizers; those within are plain.
    "loss_scale_optimizer": ("loss_scale_optimizer", keras.optimizers.LossScaleOptimizer),
    "loss_scale_around": ("loss_scale_optimizer", keras.optimizers.SGD),
    "multi_optimizer": ("multi_optimizer", keras.optimizers.MultiOptimizer),
}
"""The test modules, and of which classes the optimizers are wrapped."""

ACCUMULATES = "it sets `gradient_accumulation_steps`, which a wrapped optimizer must not have"
OVERWRITES = "its variable is overwritten with the gradient, which cannot be accumulated: an error says so"
PRIVATE = "it calls or reads what only the wrapped optimizer has: `optimizer.inner_optimizer`"
SPARSE = "it expects sparse updates of a small table, of which a window's gradient is dense"
VARIABLES = "it forbids assignments to variables that are no scalars, and the window counts in one what has no gradient"
EXCEPTIONS = {
    "loss_scale_optimizer": {
        "test_apply_with_no_vars": PRIVATE,
        "test_finite_step_stateful": PRIVATE,
        "test_finite_step_with_inner_loss_scale_stateful": PRIVATE,
        "test_finite_step_with_overwrite_stateful": OVERWRITES,
        "test_serialization": "it counts the entries of the config",
    },
    "loss_scale_around": {"test_finite_step_with_overwrite_stateful": OVERWRITES},
    "multi_optimizer": {
        "test_default_fallback": PRIVATE,
        "test_multi_optimizer_blocks_nested_optimizers": "a wrapped MultiOptimizer is none for `isinstance`",
        "test_serialization": PRIVATE,
    },
    "muon": {
        "test_Newton_Schulz": PRIVATE,
        "test_adamw_single_step": PRIVATE,
        "test_adamw_weight_decay": PRIVATE,
        "test_lr_adjust_*": PRIVATE,
        "test_muon_single_step": PRIVATE,
        "test_should_use_adamw": PRIVATE,
    },
    "nadam": {"test_build_with_empty_var_list": PRIVATE},
    "optimizer": {
        "test_gradient_accumulation*": ACCUMULATES,
        "test_optimizer_auto_naming": "it expects the names of plain optimizers",
        "test_overwrite_with_gradient": OVERWRITES,
        "test_overwrite_with_gradient_with_gradient_accumulation": ACCUMULATES,
        "test_set_weights": "the error for an optimizer that is not built has other words",
    },
    "optimizer_sparse": {
        f"test_sparse_gradients_{name}": SPARSE
        for name in ["adadelta", "adafactor", "adagrad", "loss_scale_optimizer_sgd", "rmsprop", "scatter_update", "sgd"]
    }
    | {
        f"test_sparse_gradients_{name}": VARIABLES
        for name in ["adam", "adam_amsgrad", "adamw", "adamw_amsgrad", "lion", "sgd_momentum", "sgd_momentum_nesterov"]
    },
    "sgd": {"test_single_step": "it counts the variables, which include those of the window"},
}
BY_DEFAULT = {
    "adam": ["test_correctness_with_golden", "test_ema_overwrite_frequency"],
    "optimizer": ["test_clip_norm", "test_empty_gradients", "test_static_loss_scaling"],
}


def stand_ins(classes):
    def replacing(used):
        def wrap(optimizer):
            plain = isinstance(optimizer, classes) and not isinstance(optimizer, GradientAccumulateOptimizer)
            return GradientAccumulateOptimizer(optimizer, 1) if plain else optimizer

        def replace(value):
            if value is keras.optimizers.get:
                used.append(value)
                return lambda *args: wrap(keras.optimizers.get(*args))
            if inspect.isclass(value) and issubclass(value, classes):
                return StandIn(value, wrap, used)
            return value

        return replace

    return replacing


def cases_of_keras():
    """The test cases, by name."""
    cases = {}
    for name, (kind, classes) in MODULES.items():
        module = keras_tests(f"optimizers.{kind}_test")
        arguments = stand_ins(classes), EXCEPTIONS.get(name, {}), BY_DEFAULT.get(name, ())
        cases |= {f"Test_{name}": over(module, case, *arguments) for case in test_cases(module)}
    return cases


globals().update(cases_of_keras())
