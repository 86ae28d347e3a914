"""Tests a wheel: python tools/test_wheel.py WHEEL MINOR..., with the minor releases of TensorFlow that it has ops for.

Each of them, as `tensorflow` and as `tensorflow-cpu`, and an older one that the wheel has no ops for, gets a new
virtual environment without a compiler. There `wheel_check.py` has to pass, and pip must not have changed TensorFlow. An
older one that there is none of for this Python is left out.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

TOOLS = pathlib.Path(__file__).resolve().parent


def older(minor: str) -> str:
    """The minor release before."""
    major, number = minor.split(".")
    return f"{major}.{int(number) - 1}"


def is_offered(package: str, minor: str) -> bool:
    """Whether there are releases of a minor release for this Python."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", directory, f"{package}=={minor}.*"],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0 and "No matching distribution found" not in done.stderr:
        raise SystemExit(f"{package} {minor}:\n{done.stderr}")
    return done.returncode == 0


def test(wheel: str, package: str, minor: str, expected: str) -> None:
    """Tests one combination."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        python = pathlib.Path(directory) / "bin" / "python"
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"{package}=={minor}.*"], check=True)
        start = time.perf_counter()
        subprocess.run([*pip, "install", wheel], check=True)
        seconds = time.perf_counter() - start
        installed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout.splitlines()
        packages = [each.split("==") for each in installed if each.startswith("tensorflow") and "==" in each]
        found = [each for each in packages if each[0] in ("tensorflow", "tensorflow-cpu", "tensorflow_cpu")]
        assert len(found) == 1, found
        assert found[0][1].startswith(f"{minor}."), found
        done = subprocess.run(
            [str(python), str(TOOLS / "wheel_check.py"), expected],
            env={"PATH": str(python.parent), "HOME": directory},
            capture_output=True,
            text=True,
            cwd=directory,
        )
        if done.returncode != 0:
            raise SystemExit(f"{package} {minor}:\n{done.stdout}\n{done.stderr}")
        print(f"{package}, pip install in {seconds:.1f} s; {done.stdout.strip()}", flush=True)


def main() -> None:
    """Tests all combinations."""
    wheel, *minors = sys.argv[1:]
    for minor in minors:
        for package in ("tensorflow", "tensorflow-cpu"):
            test(wheel, package, minor, "fused")
    unsupported = older(minors[0])
    if is_offered("tensorflow-cpu", unsupported):
        test(wheel, "tensorflow-cpu", unsupported, "reference")
    else:
        python = ".".join(map(str, sys.version_info[:2]))
        print(f"There is no TensorFlow {unsupported} for Python {python}: the fallback is not tested.", flush=True)


if __name__ == "__main__":
    main()
