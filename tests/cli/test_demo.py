import re
import sys

import pytest
from click.testing import CliRunner

import accumops
from accumops.cli import main
from accumops.ops import library

# Rows of the table end in: difference, accuracy, seconds, accumulator bytes, layer output bytes.
_DIFFERENCE = re.compile(r"^\s*accumulated, (\w+) +(\d+) +(\d\.\de[+-]\d\d) ", re.MULTILINE)


def invoke(*arguments):
    result = CliRunner().invoke(main, ["demo", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_runs_agree_and_a_picture_is_saved(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    before = accumops.get_backend()
    result = invoke("--updates", "8", "--output", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in result.stdout
    assert "full batch" in result.stdout
    found = _DIFFERENCE.findall(result.stdout)
    assert [(run, updates) for run, updates, _ in found] == [("fused", "8"), ("reference", "8")]
    assert all(float(difference) <= 1e-4 for _, _, difference in found)
    assert accumops.get_backend() == before


@pytest.mark.exhaustive
def test_fused_run_is_skipped_where_it_cannot_run(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(library, "load", lambda: (None, "it was built for another TensorFlow"))
    result = invoke("--updates", "1", "--output", str(tmp_path / "loss.svg"))
    assert result.exit_code == 0, result.output
    assert "The fused run is skipped: it was built for another TensorFlow." in result.stdout
    assert [run for run, _, _ in _DIFFERENCE.findall(result.stdout)] == ["reference"]
    assert (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("missing", ["sklearn.datasets", "matplotlib.figure"])
def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    result = invoke()
    assert result.exit_code == 1
    assert "pip install 'accumops[demo]'" in result.stderr
    assert missing.split(".")[0] in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--updates", "0"], ["--updates", "x"], ["--output", "no/such/directory/a.png"], ["--output", "a.txt"]],
    ids=str,
)
def test_bad_values_are_usage_errors(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
