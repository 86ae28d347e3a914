"""The compiled ops are found, checked and loaded, or the reason why not is given."""

import json
import pathlib
import warnings

import numpy as np
import processes
import pytest
import tensorflow as tf

import accumops
from accumops.ops import library

LIBRARY = library._library_for(tf.__version__).name


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A copy of the installed libraries that a test may damage. Afterwards the original ones are loaded again."""
    loaded, load_op_library = library.load()[0], tf.load_op_library
    original = library._library_for(tf.__version__).read_bytes()

    def load_once(path):
        # An undamaged copy would register every op a second time, which TensorFlow does not survive.
        return loaded if pathlib.Path(path).read_bytes() == original else load_op_library(path)

    monkeypatch.setattr(tf, "load_op_library", load_once)
    for name in ("_build_info.json", LIBRARY, "libaccumops_kernels.so"):
        (tmp_path / name).write_bytes((library._DIRECTORY / name).read_bytes())
    monkeypatch.setattr(library, "_DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr(library, "_backend", "auto")
    library.load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    library.load.cache_clear()


def record(installation, **changes):
    path = installation / "_build_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def accumulate_once():
    accumulator = tf.Variable([1.0, 2.0])
    accumops.ops.accumulate([accumulator], [tf.ones([2])], scale=2.0)
    np.testing.assert_array_equal(accumulator.numpy(), [3, 4])


def check_fallback(*parts):
    """The reference does the work, one warning says why, and "fused" raises the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accumulate_once()
        accumulate_once()
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    for part in parts:
        assert part in messages[0]
    with pytest.raises(accumops.LibraryError) as raised:
        accumops.set_backend("fused")
    assert all(part in str(raised.value) for part in parts)
    info = accumops.build_info()
    assert not info["loaded"]
    assert all(part in info["reason"] for part in parts)


def test_missing(installation):
    (installation / LIBRARY).unlink()
    check_fallback("no compiled ops", "pip install")


def test_never_built(installation):
    (installation / "_build_info.json").unlink()
    check_fallback("no compiled ops")
    assert accumops.build_info()["tensorflow"] is None


def test_built_for_another_tensorflow(installation):
    other = installation / "_tensorflow_ops_2_7.so"
    (installation / LIBRARY).rename(other)
    record(installation, tensorflow="2.6.1;2.7.0")
    check_fallback("for TensorFlow 2.6 and 2.7", f"TensorFlow {tf.__version__} is installed", "install TensorFlow 2.7")


def test_the_library_for_the_installed_tensorflow_is_chosen(installation):
    record(installation, tensorflow=f"2.6.1;{tf.__version__};2.99.0")
    assert library.load()[1] is None
    assert accumops.build_info()["tensorflow"] == ["2.6.1", tf.__version__, "2.99.0"]


def test_another_patch_release_is_the_same_tensorflow(installation):
    record(installation, tensorflow=".".join(tf.__version__.split(".")[:2]) + ".99")
    assert library.load()[1] is None


def test_refused_by_the_linker(installation):
    (installation / LIBRARY).write_bytes(b"\x7fELF and no more")
    check_fallback("linker", LIBRARY, "--force-reinstall", "--no-build-isolation")


def test_unresolved_symbol(installation):
    """This happens, for one, if TensorFlow's symbols contain Abseil's version and the version has changed."""
    path = installation / LIBRARY
    data = path.read_bytes()
    symbol = b"_ZN10tensorflow8OpKernelC2EPNS_20OpKernelConstructionE"
    assert symbol in data
    path.write_bytes(data.replace(symbol, symbol.replace(b"OpKernelC2E", b"OpKernelC9E")))
    check_fallback("linker", "undefined symbol")


def test_gpu_variables_without_usable_cuda_kernels(installation, monkeypatch):
    """With a driver that is too old the ops load, but the reference must do the work on the GPU."""

    class Kernels:
        @staticmethod
        def cuda_status():
            return {"driver_version": 12040, "error": "CUDA driver version is insufficient for CUDA runtime version"}

    record(installation, cuda="13.0", cuda_architectures="80-real;90")
    monkeypatch.setattr(library, "load_kernels", lambda: Kernels)
    library.gpu_problem.cache_clear()

    class Variable:
        device = "/job:localhost/replica:0/task:0/device:GPU:0"

    message = r"580 or newer.*driver serves CUDA 12.4 \(.*insufficient.*update the driver"
    with pytest.warns(RuntimeWarning, match=message):
        assert library.fused_ops([Variable()]) is None
    assert library.fused_ops([tf.Variable(1.0)]) is not None
    # What XLA compiles runs none of our kernels.
    found = []
    tf.function(lambda: found.append(library.fused_ops([Variable()])), jit_compile=True, autograph=False)()
    assert found[0] is not None
    accumops.set_backend("fused")
    with pytest.raises(accumops.LibraryError, match="insufficient"):
        library.fused_ops([Variable()])
    library.gpu_problem.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("75-real;80-real;90", (9, 0), True),
        ("75-real;80-real;90", (8, 6), True),
        ("75-real;80-real;90", (12, 0), True),  # from PTX
        ("75-real;80-real;90-real", (12, 0), False),
        ("80-real;90", (7, 5), False),
        ("90a", (9, 0), True),
        ("native", (7, 0), True),
    ],
)
def test_architectures_that_run_on_a_gpu(architectures, capability, runs):
    assert library._runs_on(architectures.split(";"), *capability) == runs


def test_backend_choice(monkeypatch):
    monkeypatch.setattr(library, "_backend", None)
    monkeypatch.setenv("ACCUMOPS_BACKEND", "reference")
    assert accumops.get_backend() == "reference"
    assert library.fused_ops([tf.Variable(1.0)]) is None
    accumops.set_backend("auto")
    assert accumops.get_backend() == "auto"
    assert library.fused_ops([tf.Variable(1.0)]) is not None


def test_wrong_backend(monkeypatch):
    with pytest.raises(ValueError, match="'fast'"):
        accumops.set_backend("fast")
    monkeypatch.setattr(library, "_backend", None)
    monkeypatch.setenv("ACCUMOPS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"ACCUMOPS_BACKEND.*'fast'"):
        accumops.get_backend()


def test_no_warning_where_the_reference_was_asked_for(installation):
    (installation / LIBRARY).unlink()
    accumops.set_backend("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate_once()


def test_build_info_of_this_build():
    info = accumops.build_info()
    assert info["loaded"]
    assert info["reason"] is None
    assert tf.__version__ in info["tensorflow"]
    assert "baseline" in info["instruction_sets"]
    assert (info["cuda"] is None) == (info["cuda_reason"] is not None)


def run_python(code):
    result = processes.run(code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_loads_after_xla_has_compiled_something():
    """TensorFlow registers XLA's kernels with its compilation devices once. Kernels loaded later must register too."""
    code = """
import tensorflow as tf
tf.function(lambda x: 2 * x, jit_compile=True)(tf.constant(1.0))
import accumops
a = tf.Variable([1.0])
tf.function(lambda: accumops.ops.accumulate([a], [tf.ones([1])]), jit_compile=True)()
print(a.numpy()[0])
"""
    assert run_python(code) == "2.0"


def test_import_loads_no_library_and_is_quick(tmp_path):
    """In seconds of the processor, with what Python has compiled before, as after any first import."""
    code = f"""
import sys, time, tensorflow, keras, numpy
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
keras.optimizers, keras.Variable
start = time.process_time()
import accumops
seconds = time.process_time() - start
from accumops.ops import library
print(seconds, library.load.cache_info().currsize)
"""
    run_python(code)  # compiles
    for _ in range(5):  # on a busy machine one may take more time
        seconds, loaded = run_python(code).split()
        assert loaded == "0"
        if float(seconds) < 0.15:
            break
    assert float(seconds) < 0.15
