"""Makes everything that a release publishes, and tests it: python tools/release.py, or `make release`.

    the version has an entry with a date in CHANGELOG.md, and nothing in the tree is uncommitted
    make test                       all checks
    dist/accumops-….tar.gz          the source distribution, built and installed from in a new environment
    dist/accumops-….whl             a wheel for each Python, each tested without a compiler (build_wheels.py --release)
    twine, check-wheel-contents     on all of them

Then it prints the two ways to publish. It publishes nothing itself.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from build_wheels import ROOT, environment_with, output_of, run


def version_of(pyproject: str) -> str:
    """Returns the version that pyproject.toml names."""
    found = re.search(r'^version = "([^"]+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise SystemExit("pyproject.toml has no version.")
    return found[1]


def problem_with(version: str, changelog: str, status: str) -> str | None:
    """Returns why a version cannot be released, or None.

    Args:
        version: The version.
        changelog: The text of CHANGELOG.md.
        status: What `git status --porcelain` prints.
    """
    if status.strip():
        return f"Commit first; git status says:\n{status}"
    entry = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changelog, re.MULTILINE)
    if entry is None:
        return f"CHANGELOG.md has no entry for {version}."
    if re.fullmatch(r"\d{4}-\d\d-\d\d", entry[1]) is None:
        return f"The entry for {version} in CHANGELOG.md needs the date of the release in place of {entry[1]!r}."
    return None


def test_source_distribution(archive: pathlib.Path) -> None:
    """Builds and installs from the archive in a new environment, and verifies the ops there."""
    with tempfile.TemporaryDirectory() as directory:
        run([sys.executable, "-m", "venv", f"{directory}/venv"])
        python = f"{directory}/venv/bin/python"
        run([python, "-m", "pip", "install", "--quiet", f"accumops[tensorflow] @ file://{archive}"])
        subprocess.run([python, "-m", "accumops", "verify", "--quick"], cwd=directory, check=True)


def main() -> None:
    """Makes and tests a release."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="do all of it whatever tree and changelog say")
    parser.add_argument("--no-tests", action="store_true", help="leave out `make test`")
    options = parser.parse_args()
    version = version_of((ROOT / "pyproject.toml").read_text())
    problem = problem_with(version, (ROOT / "CHANGELOG.md").read_text(), output_of("git", "status", "--porcelain"))
    if problem is not None and not options.rehearse:
        raise SystemExit(problem)
    if not options.no_tests:
        run(["make", "test"])
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    tools = environment_with("release", ["build", "twine", "check-wheel-contents"])
    run([tools, "-m", "build", "--sdist", "."])
    (archive,) = (ROOT / "dist").glob("*.tar.gz")
    test_source_distribution(archive)
    run([sys.executable, "tools/build_wheels.py", "--release"])
    made = sorted((ROOT / "dist").iterdir())
    run([tools, "-m", "twine", "check", "--strict", *made])
    run([tools.parent / "check-wheel-contents", *(each for each in made if each.suffix == ".whl")])
    print(*(f"{each.relative_to(ROOT)}  {each.stat().st_size / 2**20:.1f} MiB" for each in made), sep="\n")
    print(
        f"\nTo publish, either push the tag (the workflow builds, tests and publishes):\n"
        f"    git tag v{version} && git push origin v{version}\n"
        f"or upload what is in dist/:\n"
        f"    {tools} -m twine upload dist/*"
    )


if __name__ == "__main__":
    main()
