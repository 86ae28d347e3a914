"""`accumops info`: shows what is installed and loaded, and why something is not."""

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from accumops.cli.console import console, table
from accumops.cli.quiet import import_tensorflow


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print only JSON on stdout.")
def info(as_json: bool) -> None:
    """Show versions, devices, and whether the fused ops are in use."""
    facts = {**describe(), "upstream": _upstream()}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = table(show_header=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in _rows(facts):
        rows.add_row(name, escape(value))
    console().print(rows)


def describe() -> dict[str, Any]:
    """Returns a description of this machine and installation that JSON can hold."""
    import_tensorflow()
    import keras
    import numpy as np
    import tensorflow as tf

    import accumops
    from accumops.ops import library
    from accumops.verification import fused_problem

    try:
        backend = accumops.get_backend()
    except ValueError as error:  # ACCUMOPS_BACKEND names no backend
        raise click.UsageError(str(error)) from error
    kernels = library.load_kernels()
    cuda = kernels.cuda_status() if kernels else None
    gpus = tf.config.list_physical_devices("GPU")
    return {
        "versions": {
            "accumops": accumops.__version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "devices": [_device(device) for device in tf.config.list_physical_devices()],
            "nvidia_driver": _nvidia_driver(),
        },
        "build": accumops.build_info(),
        "backend": {
            "chosen": backend,
            "cpu": _backend_on("cpu", backend, fused_problem("cpu")),
            "gpu": _backend_on("gpu", backend, fused_problem("gpu")) if gpus else None,
        },
        "cpu_kernels": {
            "instruction_set": kernels.instruction_set() if kernels else None,
            "usable": kernels.instruction_sets() if kernels else None,
        },
        "cuda": {
            "tensorflow_built_with": tf.sysconfig.get_build_info().get("cuda_version"),
            "kernels_built_with": library.cuda_version(cuda["runtime_version"]) if cuda else None,
            "driver_supports": library.cuda_version(cuda["driver_version"]) if cuda else None,
            "problem": fused_problem("gpu"),
        },
        "memory_bandwidth": None,
    }


def _upstream() -> dict[str, Any]:
    """Which private names of Keras and TensorFlow accumops relies on, and which the installed versions lack."""
    from accumops.adapters import upstream

    return {"relied_on": sorted({name.path for name in upstream.relied_on()}), "missing": upstream.missing()}


def _backend_on(device: str, backend: str, problem: str | None) -> dict[str, str | None]:
    """Returns which implementation of an op runs on `device`, and the reason if it is not the fused one."""
    if backend == "reference":
        return {"runs": "reference", "reason": "it was chosen"}
    if problem is None:
        return {"runs": "fused", "reason": None}
    return {"runs": "nothing: it raises LibraryError" if backend == "fused" else "reference", "reason": problem}


def _device(device: Any) -> dict[str, Any]:
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(device) if device.device_type == "GPU" else {}
    capability = details.get("compute_capability")
    return {
        "name": device.name.removeprefix("/physical_device:"),
        "model": details.get("device_name"),
        "compute_capability": ".".join(str(part) for part in capability) if capability else None,
    }


def _cpu_name() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or None


def _nvidia_driver() -> str | None:
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group(0) if found else None


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions, machine, build, cuda = facts["versions"], facts["machine"], facts["build"], facts["cuda"]
    for key, name in (("accumops", "accumops"), ("python", "Python"), ("tensorflow", "TensorFlow"), ("keras", "Keras")):
        yield name, versions[key]
    yield "NumPy", versions["numpy"]
    yield "System", machine["system"]
    yield "CPU", machine["cpu"] or "unknown"
    yield "Devices", "\n".join(_device_line(device) for device in machine["devices"])
    yield "Fused ops", "loaded" if build["loaded"] else f"not loaded: {build['reason']}"
    if build["tensorflow"] is not None:
        yield "  built for", f"TensorFlow {' and '.join(build['tensorflow'])}, with {build['compiler']}"
        yield "  CPU kernels", _instruction_sets(build, facts["cpu_kernels"])
        yield "  CUDA kernels", _cuda_kernels(build)
    driver = machine["nvidia_driver"] or "none found"
    supports = f" (supports CUDA {cuda['driver_supports']})" if cuda["driver_supports"] else ""
    yield "CUDA", f"TensorFlow built with {cuda['tensorflow_built_with'] or 'none'}; driver: {driver}{supports}"
    yield "Backend", f"{facts['backend']['chosen']!r} is chosen"
    for device in ("cpu", "gpu"):
        runs = facts["backend"][device]
        if runs is None:
            yield f"  on {device.upper()}", "TensorFlow sees none"
        else:
            yield f"  on {device.upper()}", runs["runs"] + (f", as {runs['reason']}" if runs["reason"] else "")
    upstream = facts["upstream"]
    there = f"all {len(upstream['relied_on'])} that accumops relies on are there"
    yield "Private names", "\n".join(upstream["missing"]) or there


def _device_line(device: dict[str, Any]) -> str:
    capability = f", compute capability {device['compute_capability']}" if device["compute_capability"] else ""
    return device["name"] + (f" ({device['model']}{capability})" if device["model"] else "")


def _instruction_sets(build: dict[str, Any], kernels: dict[str, Any]) -> str:
    built = ", ".join(build["instruction_sets"] or [])
    return f"{built}; in use: {kernels['instruction_set'] or 'unknown, as the module of the kernels is not installed'}"


def _cuda_kernels(build: dict[str, Any]) -> str:
    if build["cuda"] is None:
        return f"none: {build['cuda_reason'] or 'built without'}"
    return f"CUDA {build['cuda']} for {', '.join(build['cuda_architectures'] or [])}"
