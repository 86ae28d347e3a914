"""The parts of the scripts in benchmarks/gpu that can be tried without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(HERE))

import compile_for_gpu  # noqa: E402
import count_xla_kernels  # noqa: E402
import repeat  # noqa: E402
import trace_steps  # noqa: E402


def write_profile(directory, planes):
    """Writes a profile of events `(name, begin, end)`, in microseconds, for each plane."""
    space = xplane_pb2.XSpace()
    for number, (plane_name, events) in enumerate(planes.items()):
        plane = space.planes.add(id=number, name=plane_name)
        line = plane.lines.add(id=1, timestamp_ns=1_000)
        for index, (name, begin, end) in enumerate(events):
            plane.event_metadata[index].id = index
            plane.event_metadata[index].name = name
            line.events.add(metadata_id=index, offset_ps=begin * 10**6, duration_ps=(end - begin) * 10**6)
    (directory / "host.xplane.pb").write_bytes(space.SerializeToString())


def test_what_a_micro_step_does_is_counted(tmp_path):
    write_profile(
        tmp_path,
        {
            "/host:CPU": [("step#id=1#", 10, 20), ("step#id=2#", 30, 40), ("other", 31, 32)],
            "/host:CUPTI": [
                ("cuLaunchKernel", 11, 12),
                ("cuStreamSynchronize", 5, 6),
                ("cuStreamSynchronize", 33, 34),
                ("cuMemcpyDtoHAsync_v2", 35, 36),
            ],
            "/device:GPU:0": [
                ("AccumulateKernel", 12, 13),
                ("AccumulateKernel", 32, 33),
                ("MemcpyD2H", 36, 37),
                ("MemcpyH2D", 2, 3),
            ],
        },
    )
    counts = trace_steps.count(trace_steps.read_events(str(tmp_path)), "step")
    assert counts == {
        "launches": 1.0,
        "waits": 0.5,
        "copies to the host": 0.5,
        "copies to the device": 0.0,
        "copies on the device": 0.0,
    }
    with pytest.raises(ValueError, match="no event 'window'"):
        trace_steps.count(trace_steps.read_events(str(tmp_path)), "window")


def test_a_profile_of_this_machine(tmp_path):
    x = tf.ones([8, 8])
    counts = trace_steps.profile("product", tf.function(lambda: x @ x))
    assert counts["copies to the host"] == 0


@pytest.mark.parametrize("subject", repeat.SUBJECTS)
def test_what_is_repeated(subject):
    first, second = repeat.SUBJECTS[subject](), repeat.SUBJECTS[subject]()
    assert [each.numpy().tobytes() for each in first] == [each.numpy().tobytes() for each in second]


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU")
@pytest.mark.parametrize("script", [pytest.param("tensorflow.sh", marks=pytest.mark.exhaustive), "kernels.sh"])
def test_without_a_gpu_there_is_nothing_to_check(script, tmp_path):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": sys.executable}
    run = subprocess.run([str(HERE / script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "GPU" in run.stderr or "not found" in run.stderr


PROGRAM = """\
%gemm_fusion_computation (parameter_0: f32[8,4], parameter_1: f32[8,6], parameter_2: f32[4,6]) -> f32[4,6] {
  %parameter_0 = f32[8,4]{1,0} parameter(0)
  %dot.1 = f32[4,6]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={0}
  ROOT %add.1 = f32[4,6]{1,0} add(%parameter_2, %dot.1), metadata={op_name="while/AccumOps>Accumulate"}
}

%fused_add (param_0: f32[6], param_1: f32[6]) -> f32[6] {
  %param_0 = f32[6]{0} parameter(0)
  ROOT %add.2 = f32[6]{0} add(%param_0, %param_1), metadata={op_name="while/AccumOps>Accumulate"}
}

%body.3 (arg: (s32[], f32[4,6], f32[6])) -> (s32[], f32[4,6], f32[6]) {
  %arg = (s32[], f32[4,6]{1,0}, f32[6]{0}) parameter(0)
  %weights = f32[4,6]{1,0} get-tuple-element(%arg), index=1
  %gemm_fusion = f32[4,6]{1,0} fusion(%x, %y, %weights), kind=kCustom, calls=%gemm_fusion_computation
  %loop_add_fusion = f32[6]{0} fusion(%bias, %z), kind=kLoop, calls=%fused_add
  %reduced = (f32[6]{0}, s8[64]{0}) custom-call(%y), custom_call_target="something"
  ROOT %tuple = (s32[], f32[4,6]{1,0}, f32[6]{0}) tuple(%i, %gemm_fusion, %loop_add_fusion)
}

ENTRY %main (p0: f32[4,6]) -> f32[4,6] {
  %p0 = f32[4,6]{1,0} parameter(0)
  %copy.1 = f32[4,6]{1,0} copy(%p0)
  %while.1 = (s32[], f32[4,6]{1,0}, f32[6]{0}) while(%tuple.1), condition=%less, body=%body.3
  ROOT %result = f32[4,6]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_kernels_of_a_program_are_counted():
    assert count_xla_kernels.count(PROGRAM) == (3, 1, 6 * 4)


def test_a_program_is_written_as_for_a_gpu():
    program = """\
%1 = mhlo.copy %0 : tensor<2048x8xf32> loc(#loc2)
%2 = stablehlo.custom_call @accumops_barrier(%0, %1) {xla_shape = "(f32[4])"} : (tensor<4xf32>, tensor<f32>) -> !tuple
%3 = stablehlo.get_tuple_element %2[0] : (!tuple) -> tensor<4xf32> loc(#loc2)
%4 = stablehlo.custom_call @accumops_barrier(%0) {config = ""} : (tensor<4xf32>) -> tuple<tensor<4xf32>> loc(#loc)
%5 = stablehlo.get_tuple_element %4[0] : (tuple<tensor<4xf32>>) -> tensor<4xf32>
%6 = stablehlo.get_tuple_element %other[0] : (tuple<tensor<4xf32>>) -> tensor<4xf32>"""
    assert compile_for_gpu.as_for_a_gpu(program).splitlines() == [
        "%1 = stablehlo.reshape %0 : (tensor<2048x8xf32>) -> tensor<2048x8xf32> loc(#loc2)",
        "%2:2 = stablehlo.optimization_barrier %0, %1 : tensor<4xf32>, tensor<f32>",
        "%3 = stablehlo.reshape %2#0 : (tensor<4xf32>) -> tensor<4xf32>",
        "%4 = stablehlo.optimization_barrier %0 : tensor<4xf32>",
        "%5 = stablehlo.reshape %4 : (tensor<4xf32>) -> tensor<4xf32>",
        "%6 = stablehlo.get_tuple_element %other[0] : (tuple<tensor<4xf32>>) -> tensor<4xf32>",
    ]


def test_what_compiling_for_a_gpu_needs_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps jax-cuda12-plugin"):
        compile_for_gpu.compile_program("", triton=True)
