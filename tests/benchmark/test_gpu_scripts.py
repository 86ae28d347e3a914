"""The parts of the scripts in benchmarks/gpu that can be tried without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(HERE))

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
