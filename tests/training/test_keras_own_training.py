"""Keras's own tests of its trainer and its callbacks, over models wrapped in a GradientAccumulateModel.

docs/keras_tests.md has the results.
"""

import inspect

import keras
from keras.src.trainers.trainer import Trainer
from keras_tests import StandIn, keras_tests, over, test_cases

from accumops import GradientAccumulateModel

CALLBACKS = [
    "backup_and_restore",
    "callback",
    "csv_logger",
    "early_stopping",
    "lambda_callback",
    "learning_rate_scheduler",
    "model_checkpoint",
    "monitor_callback",
    "orbax_checkpoint",
    "reduce_lr_on_plateau",
    "remote_monitor",
    "swap_ema_weights",
    "tensorboard",
    "terminate_on_nan",
]
MODULES = {"trainer": "trainers.trainer_test"} | {name: f"callbacks.{name}_test" for name in CALLBACKS}
MODES = {"accum_steps": {"accum_steps": 1}, "micro_batch_size": {"micro_batch_size": 1}}

NEEDS = {"tensorboard": "tensorboard", "orbax_checkpoint": "orbax.checkpoint"}

OWN_STEP = "its model has a step or a loss of its own: the error says to wrap the optimizer"
LAYERS = "its Sequential is wrapped before it knows its input, so its layers are in `model.model.layers`"
ATTRIBUTE = "it reads or calls what only the wrapped model has: `model.model`"
SPARSE = {
    "accum_steps": "it expects sparse updates of a small table, of which a window's gradient is dense",
    "micro_batch_size": "a batch of sparse tensors cannot be split: the error says to use `accum_steps`",
}
PASSES = {"micro_batch_size": "it counts the passes through a layer, and each sample is one"}
EXCEPTIONS = {
    "trainer": {
        "test_adds_loss_scaling_optimizer": "the LossScaleOptimizer is within the model's optimizer",
        "test_callbacks_can_update_state_at_batch_boundary": ATTRIBUTE,
        "test_compute_loss_no_training_backwards_compatibility": OWN_STEP,
        "test_constraints_are_applied": LAYERS,
        "test_evaluate_with_custom_compute_loss": OWN_STEP,
        "test_evaluate_with_custom_test_step_*": OWN_STEP,
        "test_fit_sparse_scipy_*": SPARSE,
        "test_fit_sparse_tf_*": SPARSE,
        "test_fit_with_custom_train_step": OWN_STEP,
        "test_fwd_pass_loss_presence_in_compute_loss": OWN_STEP,
        "test_metric_update_in_compute_loss": OWN_STEP,
        "test_retracing": OWN_STEP,
    },
    "backup_and_restore": {
        "test_backup_corrupted": PASSES,
        "test_best_case_epoch": PASSES,
        "test_best_case_step": PASSES,
    },
    "callback": {"test_model_state_is_current_on_epoch_end": ATTRIBUTE},
    "csv_logger": {"test_stop_training_csv": ATTRIBUTE},
    "swap_ema_weights": {
        "test_swap_ema_weights_with_loss_scale_optimizer": "SwapEMAWeights looks for moving averages one wrapper deep"
    },
    "terminate_on_nan": {"test_TerminateOnNaN": ATTRIBUTE},
}
BY_DEFAULT = {
    "trainer": ["test_recompile"],
    "learning_rate_scheduler": ["test_updates_learning_rate"],
}


def as_model(kind):
    """A class of Keras's tests that is a layer and a trainer, as a model."""
    if issubclass(kind, keras.Model):
        return kind
    methods = {"call": kind.call}
    if kind.build is not keras.Layer.build:
        methods["build"] = kind.build
    return type(kind.__name__, (kind, keras.Model), methods)


def stand_ins(mode):
    def replacing(used):
        def wrap(model):
            return GradientAccumulateModel(model, **MODES[mode])

        def replace(value):
            is_model = inspect.isclass(value) and issubclass(value, Trainer) and issubclass(value, keras.Layer)
            return StandIn(as_model(value), wrap, used) if is_model else value

        return replace

    return replacing


def exceptions_of(name, mode):
    reasons = EXCEPTIONS.get(name, {})
    of_mode = {pattern: reason if isinstance(reason, str) else reason.get(mode) for pattern, reason in reasons.items()}
    return {pattern: reason for pattern, reason in of_mode.items() if reason}


def cases_of_keras():
    """The test cases, by name."""
    cases = {}
    for name, path in MODULES.items():
        module = keras_tests(path)
        for mode in MODES:
            arguments = stand_ins(mode), exceptions_of(name, mode), BY_DEFAULT.get(name, ()), NEEDS.get(name)
            cases |= {f"Test_{name}_{mode}": over(module, case, *arguments) for case in test_cases(module)}
    return cases


globals().update(cases_of_keras())
