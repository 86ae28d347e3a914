"""Instruction sets, the bandwidth probe, what is reported of CUDA and of the build, and the type stub."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

STUB = Path(__file__).parents[2] / "accumops" / "ops" / "_kernels.pyi"


def test_the_widest_instruction_set_is_in_use(kernels):
    usable = kernels.instruction_sets()
    assert usable[0] == "baseline"
    assert set(usable) <= {"baseline", "avx2", "avx512"}
    assert kernels.instruction_set() == usable[-1]


def test_an_instruction_set_is_chosen_by_name(kernels):
    before = kernels.instruction_set()
    for name in kernels.instruction_sets():
        kernels.use_instruction_set(name)
        assert kernels.instruction_set() == name
    kernels.use_instruction_set(before)
    with pytest.raises(ValueError, match="no instruction set 'sse9'; use one of 'baseline'"):
        kernels.use_instruction_set("sse9")
    assert kernels.instruction_set() == before


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [0, 1, 17, 65536, 3 * 65536 + 5])
def test_triad(device, size, streaming):
    if device.name == "cuda":
        pytest.skip("the triad is the host's")
    b, c = np.random.default_rng(0).standard_normal((2, size), np.float32)
    for offset in (0, 1, 5, 16):
        buffer = np.full(size + 20, np.nan, np.float32)
        device.kernels.triad(buffer[offset : offset + size], b, c, scale=0.3, threads=3, streaming=streaming)
        np.testing.assert_array_equal(buffer[offset : offset + size], b + np.float32(0.3) * c)
        assert np.isnan(buffer).sum() == 20


def test_triad_rejects_what_it_cannot_do(kernels):
    a, b, c = np.ones((3, 10), np.float32)
    with pytest.raises(ValueError, match=r"c has shape \(9,\); it must have shape \(10,\), that of a"):
        kernels.triad(a, b, c[:9])
    with pytest.raises(TypeError, match="b has dtype float64; it must be float32"):
        kernels.triad(a, b.astype(np.float64), c)
    with pytest.raises(ValueError, match="b and a share memory"):
        kernels.triad(a[1:], a[:-1], c[1:])
    with pytest.raises(ValueError, match="a is read-only"):
        kernels.triad(np.broadcast_to(a, (1, 10)), b[None], c[None])
    np.testing.assert_array_equal(a, 1)


def test_memory_bandwidth(kernels):
    found = kernels.memory_bandwidth(2, bytes_per_array=4 << 20, repeats=3)
    assert found["best"] == max(found["plain"], found["streaming"])
    assert all(1e8 < rate < 1e14 for rate in found.values())
    assert kernels.memory_bandwidth(bytes_per_array=4, repeats=1)["best"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bytes_per_array": 3}, ValueError, "bytes_per_array must be at least 4, got 3"),
        ({"bytes_per_array": 2**63 - 1}, MemoryError, "bad_alloc"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ({"threads": 0}, ValueError, "threads must be None or an int of at least 1, got 0"),
    ],
)
def test_memory_bandwidth_rejects_what_it_cannot_do(kernels, arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.memory_bandwidth(**arguments)


def test_cuda_status_never_raises(kernels):
    status = kernels.cuda_status()
    assert set(status) == {"built", "runtime_version", "driver_version", "device_count", "error"}
    assert status["built"] == (status["runtime_version"] > 0)
    assert (status["error"] is None) == (status["device_count"] > 0)


def test_build_info(kernels):
    info = kernels.build_info()
    assert info["compiler"].split()[0] in ("GCC", "Clang")
    assert info["instruction_sets"] == kernels.instruction_sets()
    assert (info["cuda_runtime_version"] is not None) == kernels.cuda_status()["built"]


@pytest.mark.skipif(not STUB.exists(), reason="the sources are not here")
def test_the_stub_says_what_the_module_has(kernels):
    functions = {node.name: node.args for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {name for name in vars(kernels) if not name.startswith("_")}
    for name, arguments in functions.items():
        parameters = inspect.signature(getattr(kernels, name)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert [a.arg for a in arguments.args] == positional, name
        assert [a.arg for a in arguments.kwonlyargs] == keyword, name
        defaults = [ast.literal_eval(d) for d in [*arguments.defaults, *filter(None, arguments.kw_defaults)]]
        assert defaults == [p.default for p in parameters if p.default is not p.empty], name
        assert getattr(kernels, name).__doc__, name
