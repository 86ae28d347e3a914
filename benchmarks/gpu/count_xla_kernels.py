"""Counts the kernels that XLA makes of a step of `micro_batch_size`, compiled for a GPU that is not there.

    python benchmarks/gpu/count_xla_kernels.py [MODEL...] [--recompute] [--jax PYTHON]

For each model: the kernels of a micro-batch, those of the rest of a window, how large the accumulators are, how many of
these bytes are added to by kernels that compute no product, and the memory that the program needs beside arguments and
results. With `--recompute`, how many products forward and backward compute, and their memory, with activations that are
computed again and without. `compile_for_gpu.py` compiles; PYTHON is one that has what it needs.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import count_launches
import keras
import tensorflow as tf

import accumops

HERE = Path(__file__).parent
# What a program's line is, unless it launches a kernel.
NO_KERNEL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "after-all",
    "call",
}
BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
PRODUCT = re.compile(r" dot\(|__cublas|__triton_gemm")


class Counts(NamedTuple):
    """What a program does."""

    micro_batch: int
    """Kernels of a micro-batch."""
    window: int
    """All others."""
    apart: int
    """Bytes of the accumulators that a kernel adds to which computes no product."""


def wide_mlp() -> keras.Model:
    """Three wide layers and a small one."""
    layers = keras.layers
    wide = (layers.Dense(2048, "relu") for _ in range(3))
    return keras.Sequential([keras.Input((2048,)), *wide, layers.Dense(10)])


def vision_transformer() -> keras.Model:
    """Two blocks over patches of a picture. XLA compiles no window of tables whole."""
    layers = keras.layers
    patches = keras.Input((64, 192))
    x = layers.Dense(512)(patches)
    for _ in range(2):
        x = x + layers.MultiHeadAttention(8, 64)(*[layers.LayerNormalization()(x)] * 2)
        x = x + layers.Dense(512)(layers.Dense(2048, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(patches, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


MODELS = {"MLP 2048x4": wide_mlp, "transformer": vision_transformer, "ResNet50": count_launches.MODELS["ResNet50"]}


def program_of(model: keras.Model, *, weighted: bool) -> str:
    """A whole step of `micro_batch_size` over four micro-batches, as TensorFlow hands it to XLA."""
    wrapper = accumops.GradientAccumulateModel(model, micro_batch_size=16)
    wrapper.compile(keras.optimizers.Adam(), count_launches.LOSS, jit_compile=True)
    shape = (64, *model.inputs[0].shape[1:])
    batch = (tf.zeros(shape, model.inputs[0].dtype), tf.zeros([64], tf.int32))
    batch += (tf.ones([64]),) if weighted else ()
    # As on a GPU, where XLA compiles convolutions in loops, too.
    with unittest.mock.patch.object(accumops.GradientAccumulateModel, "compiles_passes", False):
        wrapper.fit(tf.data.Dataset.from_tensors(batch), steps_per_epoch=1, verbose=0)
        step = tf.function(lambda *batch: wrapper.train_step(batch), jit_compile=True, autograph=False)
        return step.experimental_get_compiler_ir(*batch)(stage="stablehlo")


def compiled(program: str, python: str, *options: str) -> tuple[str, int]:
    """What `compile_for_gpu.py` makes of a program: its text, and the bytes beside arguments and results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.mlir"
        path.write_text(program)
        command = [python, str(HERE / "compile_for_gpu.py"), str(path), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    text, _, extra = done.stdout.strip().rpartition("\nbytes beside arguments and results: ")
    return text, int(extra)


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program, by name; `ENTRY` is where it begins."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^(?:ENTRY )?%[\w.-]+ \(.*?^}", text, re.DOTALL | re.MULTILINE):
        first, *lines = block.splitlines()
        found["ENTRY" if first.startswith("ENTRY") else first.split()[0]] = lines
    return found


def kernels(lines: list[str]) -> Iterator[str]:
    """The lines of a computation that launch a kernel."""
    for line in lines:
        operation = re.search(r"(?:[\])}]) ([a-z][\w-]*)\(", line)
        if operation and operation[1] not in NO_KERNEL and not operation[1].endswith(("-start", "-done")):
            yield line


def size_of(shapes: str) -> int:
    """The bytes of all arrays in a text."""
    arrays = re.findall(r"\b(pred|s8|bf16|f16|s32|u32|f32|s64|f64)\[([\d,]*)\]", shapes)
    return sum(BYTES[dtype] * math.prod(int(each) for each in shape.split(",") if each) for dtype, shape in arrays)


def count(text: str) -> Counts:
    """Counts the kernels of a program."""
    by_name = computations(text)
    bodies = {name for lines in by_name.values() for line in lines for name in re.findall(r"body=(%[\w.-]+)", line)}
    micro_batch = [line for body in bodies for line in kernels(by_name[body])]
    apart = 0
    for line in micro_batch:
        called = [each for name in re.findall(r"calls=(%[\w.-]+)", line) for each in by_name[name]]
        if not any(PRODUCT.search(each) for each in [line, *called]):
            sums = [each for each in [line, *called] if re.search(r" add\(.*AccumOps>Accumulate", each)]
            apart += sum(size_of(each.split(" add(")[0]) for each in sums)
    return Counts(len(micro_batch), len(list(kernels(by_name["ENTRY"]))), apart)


def pass_of(model: keras.Model, how: dict[str, Any] | None) -> str:
    """Forward and backward over 64 samples, with activations that are computed again or not."""
    if how is not None:
        accumops.recompute_layers(model, **how)

    def run(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = count_launches.LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    x = tf.zeros((64, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
    function = tf.function(run, jit_compile=True, autograph=False)
    return function.experimental_get_compiler_ir(x, tf.zeros([64], tf.int32))(stage="stablehlo")


def count_recompute(models: Sequence[str], python: str) -> None:
    """Prints a table of what recompute does to a pass."""
    print("| model | recompute | products and convolutions | memory beside arguments and results |\n|---|---|---|---|")
    for name in models:
        for how in (None, {"segments": 6}, {"policy": "cheap"}):
            text, extra = compiled(pass_of(MODELS[name](), how), python)
            products = len(re.findall(r" dot\(|__cublas|custom_call_target=\"__cudnn", text))
            argument = "none" if how is None else ", ".join(f"`{key}={value!r}`" for key, value in how.items())
            print(f"| {name} | {argument} | {products} | {extra / 1e6:.1f} MB |", flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="by default all")
    parser.add_argument("--jax", default=sys.executable, metavar="PYTHON", help="by default this one")
    parser.add_argument("--recompute", action="store_true", help="count what recompute does to forward and backward")
    arguments = parser.parse_args()
    if arguments.recompute:
        count_recompute(arguments.models or list(MODELS), arguments.jax)
        return
    print(
        "| model | products by | kernels of a micro-batch | other kernels | accumulators | added apart | other memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments.models or MODELS:
        for weighted in (False, True):
            model = MODELS[name]()
            program = program_of(model, weighted=weighted)
            accumulators = sum(4 * math.prod(each.shape) for each in model.trainable_variables)
            for products, options in {"Triton": (), "cuBLAS": ("--no-triton",)}.items():
                text, extra = compiled(program, arguments.jax, *options)
                counts = count(text)
                megabytes = " | ".join(f"{each / 1e6:.1f} MB" for each in (accumulators, counts.apart, extra))
                row = f"{name}{', sample weights' if weighted else ''} | {products} | {counts.micro_batch} | "
                row += f"{counts.window} | {megabytes}"
                print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
