import dataclasses
import itertools
import json

import pytest
import tensorflow as tf
from click.testing import CliRunner

import accumops
from accumops import verification
from accumops.cli import main
from accumops.ops import library
from accumops.verification import runner


def invoke(*arguments):
    result = CliRunner().invoke(main, ["verify", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def dense_only(monkeypatch):
    """Some dense cases in eager mode."""

    def cases(quick):
        dense = (case for case in verification.SUBJECTS[0].cases(True) if "dense" in case.layout)
        for case in itertools.islice(dense, 40):
            yield dataclasses.replace(case, modes=("eager",))

    monkeypatch.setattr(runner, "SUBJECTS", (dataclasses.replace(verification.SUBJECTS[0], cases=cases),))


@pytest.fixture
def first_cases(monkeypatch):
    """The first cases of two subjects, in all modes. The example of `verification.run` goes through the whole grid."""

    def first(subject):
        return dataclasses.replace(subject, cases=lambda quick: itertools.islice(subject.cases(quick), 3))

    monkeypatch.setattr(runner, "SUBJECTS", tuple(first(subject) for subject in verification.SUBJECTS[:2]))


@pytest.mark.usefixtures("first_cases")
def test_quick_is_within_its_bounds(tmp_path):
    file = tmp_path / "results.json"
    result = invoke("--quick", "--device", "cpu", "--json", str(file))
    assert result.exit_code == 0, result.stdout
    assert "within their bounds" in result.stdout
    assert "FAIL" not in result.stdout
    record = json.loads(file.read_text())
    assert record["ok"] is True
    assert record["accumops"]["build"] == accumops.build_info()
    assert {group["mode"] for group in record["groups"]} == {"eager", "tf.function", "jit_compile"}
    assert sum(group["cases"] for group in record["groups"]) == len(record["cases"])
    first = record["cases"][0]
    assert first["layout"] == "float16, dense"
    assert first["fused_vs_reference_bound"] is None
    assert first["fused_vs_float64_bound"] >= 1


def test_broken_op_is_named(dense_only, monkeypatch, tmp_path):
    original = accumops.ops.accumulate

    def without_scale(*args, scale, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(accumops.ops, "accumulate", without_scale)
    file = tmp_path / "results.json"
    result = invoke("--json", str(file), "--device", "cpu")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "over their bounds" in result.stdout
    worst = result.stdout[result.stdout.index("The worst:") :]
    assert "accumulate, " in worst
    assert "scale" in worst
    assert "accumulators[" in worst
    assert json.loads(file.read_text())["ok"] is False


@pytest.mark.exhaustive
def test_raising_op_is_named(dense_only, monkeypatch):
    def refuses(*args, **kwargs):
        raise tf.errors.InternalError(None, None, "the kernel [sm_90] did not start")

    monkeypatch.setattr(accumops.ops, "accumulate", refuses)
    result = invoke("--device", "cpu")
    assert result.exit_code == 1
    assert "InternalError: the kernel [sm_90] did not start" in result.stdout


def test_no_library_exits_with_3(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (None, "this installation has no compiled ops"))
    result = invoke("--quick")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == "There is nothing fused to verify: this installation has no compiled ops.\n"


def test_no_gpu_exits_with_3(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (object(), None))
    devices = tf.config.list_physical_devices
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [] if kind == "GPU" else devices("CPU"))
    result = invoke("--device", "gpu")
    assert result.exit_code == 3
    assert result.stderr == "There is nothing fused to verify: TensorFlow sees no GPU.\n"


@pytest.mark.parametrize(
    "arguments", [["--device", "tpu"], ["--json", "no/such/directory/file.json"], ["--quick", "extra"]], ids=str
)
def test_bad_values_are_usage_errors(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
