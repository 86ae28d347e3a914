"""Builds the compiled libraries with CMake; everything else is in pyproject.toml."""

import os
import posixpath
import re
import shlex
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake for all libraries at once.

    The build tree stays in ``build/``, so that a second build only compiles what has changed; only the module of the
    kernels depends on Python. What a user may set: ``ACCUMOPS_TENSORFLOWS`` (interpreters with the TensorFlows to build
    for, separated as in ``PATH``; by default the building one), ``CMAKE_ARGS`` (any CMake argument),
    ``CMAKE_CUDA_ARCHITECTURES`` (such as ``80;90``) and CMake's own ``CUDACXX``. CUDA kernels are for all GPUs in a
    wheel, and for this machine's in an editable installation.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # What is built in place runs on this machine; a wheel, on others.
        self.machines = "LOCAL" if self.inplace else "ALL"
        name = f"cmake-{sysconfig.get_platform()}"
        compilers = [os.environ.get(variable, "") for variable in ("CXX", "CUDACXX", "CUDAHOSTCXX")]
        if any(compilers):  # CMake cannot change them in a build tree
            name += f"-{zlib.crc32(os.pathsep.join(compilers).encode()):08x}"
        self.tree = ROOT / "build" / (f"{name}-local" if self.inplace else name)

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        arguments = [
            "-GNinja",
            "-UPython_*",  # what CMake has found for another Python
            "-U_Python_*",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DACCUMOPS_CUDA_MACHINES={self.machines}",
            f"-DACCUMOPS_VERSION={self.distribution.get_version()}",
            # Given anew each time: pip's isolated environments come and go, and with them the paths that CMake cached.
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        interpreters = [each for each in os.environ.get("ACCUMOPS_TENSORFLOWS", "").split(os.pathsep) if each]
        arguments.append(f"-DACCUMOPS_TENSORFLOWS={';'.join(interpreters or [sys.executable])}")
        architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
        if architectures:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(self.tree), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(self.tree)], check=True)
        self.install_libraries(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        # For an editable install: setuptools knows of one of the files that CMake makes.
        self.install_libraries(ROOT / "accumops" / "ops")

    def install_libraries(self, directory: Path) -> None:
        for old in directory.glob("_tensorflow_ops*.so"):  # maybe for TensorFlows that are not built for any more
            old.unlink()
        subprocess.run(["cmake", "--install", str(self.tree), "--prefix", str(directory.resolve())], check=True)


class EggInfo(egg_info):
    """Has README's links lead to the repository where the package's page shows it.

    README has links relative to itself. They become absolute if ``[project.urls]`` in pyproject.toml has a
    ``Repository``, and stay as they are otherwise.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        repository = (self.distribution.metadata.project_urls or {}).get("Repository")
        if repository and self.distribution.metadata.long_description:
            self.distribution.metadata.long_description = with_absolute_links(
                self.distribution.metadata.long_description, repository.rstrip("/")
            )


def with_absolute_links(readme: str, repository: str) -> str:
    def absolute(link: re.Match) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}{link['text']}({repository}/{kind}/HEAD/{posixpath.normpath(link['target'])})"

    # A link's text may go over lines. Targets with a scheme, or within the page, stay.
    return re.sub(r"(?P<picture>!?)(?P<text>\[[^\]]*\])\((?P<target>(?!#|[a-z]+:)[^)\s]+)\)", absolute, readme)


setup(
    ext_modules=[Extension("accumops.ops._kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": EggInfo},
)
