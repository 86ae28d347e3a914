"""What the compiled TensorFlow library exports and needs: the one file must load on every TensorFlow package."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest
import tensorflow as tf

import accumops
from accumops.ops import library

LIBRARIES = sorted(library._DIRECTORY.glob("_tensorflow_ops*.so"))
KERNELS = library._DIRECTORY / "libaccumops_kernels.so"


def dynamic_symbols(path, *options):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    output = subprocess.run(["nm", "-DC", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [line[19:] for line in output.splitlines() if line.strip()]  # without address and kind


@pytest.mark.parametrize("path", [*LIBRARIES, KERNELS], ids=lambda path: path.name)
def test_no_cuda_symbol_is_left_to_the_dynamic_linker(path):
    """libtensorflow_framework exports stubs with the CUDA runtime's names, of another version than this build's."""
    symbols = dynamic_symbols(path, "--undefined-only")
    assert symbols
    assert [s for s in symbols if s.startswith(("cuda", "__cuda", "cu"))] == []


def test_the_kernels_export_nothing_but_what_is_ours():
    symbols = dynamic_symbols(KERNELS, "--defined-only")
    assert any("accumops::UpdateCpu(" in s for s in symbols)
    assert [s for s in symbols if "accumops::" not in s] == []


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_ops_export_nothing_of_ours(path):
    symbols = dynamic_symbols(path, "--defined-only")
    assert [s for s in symbols if "accumops" in s or "cuda" in s.lower()] == []


@pytest.mark.parametrize("path", [*LIBRARIES, KERNELS], ids=lambda path: path.name)
def test_needs_no_cuda_library(path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    output = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line]
    assert any("tensorflow" in name for name in needed) == (path != KERNELS)
    assert ("libaccumops_kernels.so" in needed) == (path != KERNELS)
    assert [name for name in needed if "cuda" in name or "cudnn" in name or "cublas" in name] == []
    assert "$ORIGIN" in output or path == KERNELS


def test_kernels_module_needs_no_tensorflow():
    path = next(library._DIRECTORY.glob("_kernels*.so"))
    script = f"""
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_kernels", {str(path)!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_kernels", loader))
loader.exec_module(module)
assert "tensorflow" not in sys.modules
print(module.instruction_set())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def tensorflow_cpu():
    """The interpreter of an environment that has tensorflow-cpu instead of tensorflow, and is kept between runs."""
    root = pathlib.Path(accumops.__file__).resolve().parent.parent
    directory = root / "build" / f"tensorflow-cpu-{sys.implementation.cache_tag}"
    python = directory / "bin" / "python"
    version = tf.__version__
    if not (directory / f"installed-{version}").exists():
        venv.create(directory, with_pip=True, clear=True)
        packages = [f"tensorflow-cpu=={version}", "click", "rich"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (directory / f"installed-{version}").touch()
    return python


@pytest.mark.exhaustive
def test_loads_and_runs_on_tensorflow_cpu(tensorflow_cpu):
    """tensorflow-cpu lacks tens of thousands of the symbols that tensorflow exports."""
    script = """
import tensorflow as tf
import accumops
accumops.set_backend("fused")
a = tf.Variable([1.0, 2.0])
for jit_compile in (False, True):
    tf.function(lambda: accumops.ops.accumulate([a], [tf.ones([2])], scale=3.0), jit_compile=jit_compile)()
print(a.numpy().tolist(), accumops.build_info()["cuda"])
"""
    root = pathlib.Path(accumops.__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [str(tensorflow_cpu), "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"[7.0, 8.0] {accumops.build_info()['cuda']}"


def test_the_compiler_that_cudacxx_names_and_no_other(tmp_path):
    """CMake stops where there is none of that name, also where another nvcc is on PATH."""
    source = pathlib.Path(__file__).parents[2]
    if not (source / "CMakeLists.txt").is_file() or shutil.which("cmake") is None:
        pytest.skip("needs the source tree and CMake")
    arguments = ["-S", source, "-B", tmp_path, "-DACCUMOPS_TENSORFLOWS=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(
        ["cmake", *map(str, arguments)],
        env=os.environ | {"CUDACXX": "another-cuda/bin/nvcc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert 'CUDACXX is "another-cuda/bin/nvcc", which is no program' in done.stderr
