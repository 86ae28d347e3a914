"""Compiles a program of XLA for a GPU that is not there, and prints the program that XLA has made of it.

    python benchmarks/gpu/compile_for_gpu.py PROGRAM [--no-triton]

PROGRAM is a file of StableHLO. JAX's XLA compiles it; the Python needs `jax`, `jax-cuda12-plugin`, `jax-cuda12-pjrt`
and `nvidia-cuda-nvcc-cu12`, each of which pip installs without its dependencies on CUDA's libraries. The last line says
how many bytes the program needs beside its arguments and results.

Without a GPU XLA times nothing. It chooses Triton for matrix products, or cuBLAS with `--no-triton`; on a GPU it takes
what is faster.
"""

import argparse
import importlib.util
import os
import re
from pathlib import Path

# What XLA wants to know of an NVIDIA H100; an H200 differs in its memory.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


_BARRIER = re.compile(
    r"(%\w+) = stablehlo\.custom_call @accumops_barrier\(([^)]*)\).* : \((.*)\) -> (?:tuple<.*>|!\w+)(?= loc|$)"
)


def as_for_a_gpu(program: str) -> str:
    """What a program would be if TensorFlow had written it for a GPU.

    - TensorFlow copies results with an operation that StableHLO does not have.
    - accumops's barrier is XLA's own on a GPU, and a call that XLA does not know on a CPU.
    """
    program = re.sub(r"mhlo\.copy (%[\w#]+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", program)
    lines = program.splitlines()
    results: dict[str, int] = {}
    for i, line in enumerate(lines):
        if barrier := _BARRIER.search(line):
            name, operands, types = barrier.groups()
            results[name] = number = operands.count(",") + 1
            several = f":{number}" if number > 1 else ""
            lines[i] = f"{name}{several} = stablehlo.optimization_barrier {operands} : {types}"
        elif (
            item := re.search(r"(%\w+) = stablehlo\.get_tuple_element (%\w+)\[(\d+)\] .* -> (.*?)(?= loc|$)", line)
        ) and (number := results.get(item[2])):
            name, barrier_name, index, dtype = item.groups()
            result = f"{barrier_name}#{index}" if number > 1 else barrier_name
            lines[i] = f"{name} = stablehlo.reshape {result} : ({dtype}) -> {dtype}"
    return "\n".join(lines)


def compile_program(program: str, *, triton: bool) -> tuple[str, int]:
    """Compiles a program of StableHLO.

    Returns:
        The program that runs, in HLO's text form, and the bytes that it needs beside arguments and results.
    """
    toolkit, plugin = _folder_of("nvidia.cuda_nvcc"), _folder_of("jax_plugins.xla_cuda12")
    if toolkit is None or plugin is None:
        raise SystemExit("pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12")
    flags = [f"--xla_gpu_cuda_data_dir={toolkit}", "--xla_gpu_autotune_level=0"]
    os.environ["XLA_FLAGS"] = " ".join([*flags, *([] if triton else ["--xla_gpu_enable_triton_gemm=false"])])
    os.environ["PATH"] = f"{toolkit}/bin:{os.environ['PATH']}"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # they would have to be asked of a driver

    from jax.experimental.topologies import get_topology_desc
    from jax.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    [device] = get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices
    with mlir.make_ir_context():
        module = ir.Module.parse(as_for_a_gpu(program))
        compiled = device.client.compile(module, xla_client.DeviceList((device,)), xla_client.CompileOptions())
    [made] = compiled.hlo_modules()
    return made.to_string(), compiled.get_compiled_memory_stats().temp_size_in_bytes


def _folder_of(package: str) -> str | None:
    """The folder of an installed package, or None."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # not even the package around it is installed
        return None
    return None if found is None else next(iter(found.submodule_search_locations or []), None)


def main() -> None:
    """Prints what XLA has made of a program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--no-triton", action="store_true", help="have cuBLAS compute matrix products")
    arguments = parser.parse_args()
    text, extra = compile_program(arguments.program.read_text(), triton=not arguments.no_triton)
    print(text)
    print(f"bytes beside arguments and results: {extra}")


if __name__ == "__main__":
    main()
