"""The package's page has README with links that lead somewhere."""

import email
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
README = """# accumops

A [page](docs/page.md#part) and a [link over
two lines](./CHANGELOG.md); [elsewhere](https://example.org/a.md), [here](#accumops).

![A picture](docs/window.svg)
"""
ABSOLUTE = """# accumops

A [page](https://example.org/us/it/blob/HEAD/docs/page.md#part) and a [link over
two lines](https://example.org/us/it/blob/HEAD/CHANGELOG.md); [elsewhere](https://example.org/a.md), [here](#accumops).

![A picture](https://example.org/us/it/raw/HEAD/docs/window.svg)
"""


def description(directory, urls):
    """The text of the package's page, as the metadata of a build has it."""
    for name in ("setup.py", "LICENSE"):
        shutil.copy(_ROOT / name, directory)
    project = (_ROOT / "pyproject.toml").read_text()
    if "[project.urls]" in project:
        before, _, after = project.partition("[project.urls]")
        project = before + "[" + after.partition("\n[")[2]
    (directory / "pyproject.toml").write_text(project + urls)
    (directory / "README.md").write_text(README)
    (directory / "accumops").mkdir()
    (directory / "accumops" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "--quiet", "egg_info"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metadata = email.message_from_string((directory / "accumops.egg-info" / "PKG-INFO").read_text())
    assert metadata["Description-Content-Type"] == "text/markdown"
    return metadata.get_payload().strip() + "\n"


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ("", README),
        ('\n[project.urls]\nDocumentation = "https://example.org/docs"\n', README),
        ('\n[project.urls]\nRepository = "https://example.org/us/it/"\n', ABSOLUTE),
    ],
    ids=["no address", "no repository", "repository"],
)
def test_links_of_readme(urls, expected, tmp_path):
    assert description(tmp_path, urls) == expected
