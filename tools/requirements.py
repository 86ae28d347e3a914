"""Prints the build requirements in pyproject.toml, for an environment that builds without isolation."""

import pathlib
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

project = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"
print("\n".join(tomllib.loads(project.read_text())["build-system"]["requires"]))
