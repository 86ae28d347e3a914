"""`import accumops`: names that load on first use, and Keras classes that are registered all the same."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import keras
import processes
import pytest

import accumops
from accumops import registration

_ROOT = Path(__file__).parents[1]
_PRINT_REGISTERED = "print(sorted(n for n in keras.saving.get_custom_objects() if n.startswith('accumops>')))"


def run(code):
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def registered():
    """What every module of accumops together registers."""
    for module in pkgutil.walk_packages(accumops.__path__, "accumops."):
        compiled = module.name.startswith(("accumops.ops._", "accumops.ops.libaccumops_kernels"))
        if not compiled and not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    return str(sorted(name for name in keras.saving.get_custom_objects() if name.startswith("accumops>")))


def test_import_loads_neither_tensorflow_nor_keras_nor_numpy():
    code = "import accumops, sys; print([n for n in ('tensorflow', 'keras', 'numpy') if n in sys.modules])"
    assert run(code) == "[]"


def test_type_checkers_and_the_table_see_the_same_names():
    tree = ast.parse(Path(accumops.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == accumops._MODULES | dict.fromkeys(("layers", "losses", "ops"), "accumops")
    assert sorted(seen) == sorted(accumops.__all__)


def test_names_are_those_of_their_modules():
    for name in accumops.__all__:
        value = getattr(accumops, name)
        home = "accumops" if name in ("layers", "losses", "ops") else accumops._MODULES[name]
        assert value is getattr(importlib.import_module(home), name)
    assert accumops.GradientAccumulator.__module__ == "accumops.window.accumulator"


def test_dir_lists_what_can_be_used():
    assert {*accumops.__all__, "__version__", "optimizer", "window"} <= set(dir(accumops))
    assert {name for name, _ in inspect.getmembers(accumops)} == set(dir(accumops))


def test_modules_are_attributes():
    for module in (
        "adapters",
        "arguments",
        "layers",
        "losses",
        "memory",
        "normalization",
        "ops",
        "optimizer",
        "training",
        "window",
    ):
        assert getattr(accumops, module).__name__ == f"accumops.{module}"


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'accumops' has no attribute 'nonsense'"):
        _ = accumops.nonsense
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'accumops'"):
        from accumops import nonsense  # noqa: F401
    assert not hasattr(accumops, "__wrapped__")


def test_star_import():
    names = {}
    exec("from accumops import *", names)
    assert set(accumops.__all__) <= set(names)
    assert names["GradientAccumulateModel"] is accumops.GradientAccumulateModel


@pytest.mark.parametrize(
    "code",
    [
        "import accumops.ops; import keras",  # Keras is imported while accumops.ops is half-imported
        *(
            pytest.param(code, marks=pytest.mark.exhaustive)
            for code in (
                "import accumops, importlib; importlib.reload(accumops); import keras",
                "import accumops; import keras",
                "import keras; import accumops",
                "import accumops; import tensorflow; import keras",
                "from accumops.window.accumulator import GradientAccumulator; import keras",
                "import keras; import accumops; import importlib; importlib.reload(accumops)",
                "import accumops, importlib.util as u; u.find_spec('keras').loader.get_code('keras'); import keras",
            )
        ),
    ],
)
def test_classes_are_registered_by_an_import(code, registered):
    code += f"""
import sys
{_PRINT_REGISTERED}
assert not [finder for finder in sys.meta_path if "accumops" in type(finder).__module__]
assert "accumops" not in type(keras.__spec__.loader).__module__ + type(keras.__loader__).__module__
"""
    assert run(code) == registered


def test_classes_are_registered_when_threads_import_keras(tmp_path):
    """With a stand-in for Keras: TensorFlow's own import fails where threads import it and Keras at once."""
    (tmp_path / "keras.py").write_text("import time; time.sleep(0.2); done = True")
    (tmp_path / "classes.py").write_text("import keras; assert keras.done")
    code = f"""
import importlib, sys, threading
from accumops import registration
sys.meta_path.pop(0)
sys.path.insert(0, {str(tmp_path)!r})
registration.register(["classes"])
before = len(sys.meta_path)
threads = [threading.Thread(target=importlib.import_module, args=["keras"]) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("classes" in sys.modules, before - len(sys.meta_path))
"""
    assert run(code) == "True 1"


def test_model_is_loaded_after_a_plain_import(tmp_path):
    model = accumops.GradientAccumulateModel(
        keras.Sequential([keras.Input((4,)), accumops.AccumBatchNormalization(), keras.layers.Dense(2)]), accum_steps=2
    )
    model.compile("adam", loss="mse")
    path = tmp_path / "model.keras"
    model.save(path)
    done = processes.run(f"import accumops, keras; print(type(keras.models.load_model({str(path)!r})).__name__)")
    assert done.stdout == "GradientAccumulateModel\n", done.stderr


def test_missing_tensorflow_is_an_import_error_when_a_name_is_used():
    code = """
import sys
sys.modules["tensorflow"] = None
import accumops
for use in (lambda: accumops.GradientAccumulator, lambda: accumops.ops, lambda: accumops.set_backend):
    try:
        use()
    except ImportError as error:
        print(error)
try:
    from accumops import GradientAccumulateModel
except ImportError as error:
    print(error)
"""
    errors = run(code).splitlines()
    assert len(errors) == 4
    assert all("`pip install tensorflow`" in error for error in errors)


def test_keras_is_imported_where_accumops_cannot_be(tmp_path):
    """With a stand-in for Keras that lacks what accumops imports."""
    (tmp_path / "keras.py").write_text("done = True")
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
import accumops
with warnings.catch_warnings(record=True, action="always") as caught:
    import keras
print(keras.done, *[warning.message for warning in caught])
"""
    printed = run(code)
    assert printed.startswith("True accumops' classes are not registered with Keras: ")


def test_finder_waits_for_the_last_import(monkeypatch):
    """Two threads import at once: the first to finish does nothing."""
    imported = []
    monkeypatch.setattr(importlib, "import_module", imported.append)
    finder = registration._Finder(["a module"])
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    finder.running += ["accumops.ops"]
    finder.act()
    assert imported == []
    finder.running.clear()
    finder.act()
    finder.act()
    assert imported == ["a module"]
    assert finder not in sys.meta_path
