"""Tests on replicas need several devices, which TensorFlow makes of a CPU only before it is used.

So this folder has a process of its own: `pytest tests/distribute`, the second command of `make test`.
"""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


LONGEST_FILES = ("test_workers.py", "test_placement.py")


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that no process has one of them left when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(scope="session")
def logical_devices(request):
    """Splits the CPU into four devices; skips the tests where other folders' tests run in the same process."""
    if any(HERE not in item.path.parents for item in request.session.items):
        pytest.skip("splits the CPU into logical devices, for which it needs a process of its own: `make test` runs it")
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
