"""Prints requirements in pyproject.toml: `requirements.py build`, or `requirements.py EXTRA`.

Those of the build are for an environment that builds without isolation.
"""

import pathlib
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

project = tomllib.loads((pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
name = sys.argv[1]
print(
    "\n".join(
        project["build-system"]["requires"] if name == "build" else project["project"]["optional-dependencies"][name]
    )
)
