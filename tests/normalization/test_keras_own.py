"""Keras's own tests of its layer, on AccumBatchNormalization. Skipped where the installed Keras ships no tests."""

import types
from unittest import mock

import keras
import pytest

from accumops import AccumBatchNormalization

# Keras's tests carry markers that this project does not define.
with mock.patch.object(pytest, "mark", types.SimpleNamespace(requires_trainable_backend=lambda test: test)):
    keras_tests = pytest.importorskip(
        "keras.src.layers.normalization.batch_normalization_test",
        reason=f"Keras {keras.__version__}, as it is installed, ships no tests of its own",
    )


class TestOfKeras(keras_tests.BatchNormalizationTest):
    """Keras's own tests of its layer."""

    steps = None

    @pytest.fixture(autouse=True)
    def ours(self, request, monkeypatch):
        if "renorm" in request.node.name or request.node.name == "test_serialization":
            pytest.skip("renorm=True raises an error")
        steps, made = self.steps, []

        @keras.saving.register_keras_serializable(package="test_batch_norm", name=f"Steps{steps}")
        class Ours(AccumBatchNormalization):
            def __init__(self, *args, accum_steps=steps, **kwargs):
                super().__init__(*args, accum_steps=accum_steps, **kwargs)
                made.append(self)

        monkeypatch.setattr(keras_tests.layers, "BatchNormalization", Ours)
        yield
        assert made, "Keras's test has made no AccumBatchNormalization"


@pytest.mark.exhaustive
class TestOfKerasWithOneStep(TestOfKeras):
    steps = 1
