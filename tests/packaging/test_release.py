"""A release is refused unless its version is in the changelog with a date, and the tree is committed."""

import pathlib
import sys

import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import release

    yield release
    sys.modules.pop("release", None)


def test_version_of_the_project(release):
    pyproject = (TOOLS.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{release.version_of(pyproject)}"\n' in pyproject


def test_no_version(release):
    with pytest.raises(SystemExit, match="no version"):
        release.version_of('[project]\nname = "accumops"\n')


CHANGELOG = "# Changelog\n\n## [1.2.0] - 2026-01-31\n\n## [1.1.0] - unreleased\n"


@pytest.mark.parametrize(
    ("version", "status", "problem"),
    [
        ("1.2.0", "", None),
        ("1.2.0", " M setup.py\n", "Commit first; git status says:\n M setup.py\n"),
        ("1.1.0", "", "The entry for 1.1.0 in CHANGELOG.md needs the date of the release in place of 'unreleased'."),
        ("1.3.0", "", "CHANGELOG.md has no entry for 1.3.0."),
        ("1.2", "", "CHANGELOG.md has no entry for 1.2."),
    ],
)
def test_what_is_refused(release, version, status, problem):
    assert release.problem_with(version, CHANGELOG, status) == problem
