"""Breaks the CUDA kernels one line at a time, and sees whether the checks on the emulated GPU notice.

    python tests/kernels/mutations.py [--only NAME] > benchmarks/results/cuda-mutations.md

takes about an hour on two cores. A mutation that nobody notices is a gap in the checks, and ends the script with status
1. Each is tried against the cases `few`, with results and the address sanitizer; then, as in `make test`, against the
cases `fewest` with the thread sanitizer.
"""

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sanitized

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of one kernel."""

    name: str
    file: str
    before: str
    after: str
    which: int = 0
    """Which occurrence of `before` is changed."""


BARRIER = "__syncthreads();"
ROWS, NORMS, UPDATE = "accumulate_rows_cuda.cu", "squared_norm_cuda.cu", "update_cuda.cu"
DENSE, NORMALIZE, GRADIENT = "accumulate_cuda.cu", "batch_norm_cuda.cu", "batch_norm_gradient_cuda.cu"
CLIP = "clip_units_cuda.cu"
TILING, TABLE, MOMENTS = "batch_norm_tiling.cuh", "tensor_table.cuh", "moments_cuda.cu"
NOISE = "noise_cuda.cu"

MUTATIONS = [
    Mutation("accumulate: tail", DENSE, "if (i < size) {", "if (i <= size) {"),
    Mutation("accumulate: edge", DENSE, "edge + parts.packs * kPackSize<Acc>", "edge + parts.packs"),
    Mutation(
        "accumulate: last chunk", DENSE, "left < kChunkSize<Acc> ? left : kChunkSize<Acc>", "left * 0 + kChunkSize<Acc>"
    ),
    Mutation("accumulate: alignment", DENSE, "sizeof(Grad)) == 0}", "sizeof(Grad)) >= 0}"),
    Mutation("accumulate: negative zero", DENSE, "static_cast<Acc>(-0.0)", "static_cast<Acc>(0.0)"),
    Mutation(
        "accumulate: unaligned tail",
        DENSE,
        "if (i < size) accumulator[i] = Sum(",
        "if (i <= size) accumulator[i] = Sum(",
    ),
    Mutation("tables: search", TABLE, "first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    Mutation("tables: capacity", TABLE, "entries == capacity ||", "entries == capacity + 1 ||"),
    Mutation("rows: barrier after counts", ROWS, BARRIER, "", 0),
    Mutation("rows: barrier after list", ROWS, BARRIER, "", 1),
    Mutation("rows: barrier after products", ROWS, BARRIER, "", 2),
    Mutation("rows: barrier after round", ROWS, BARRIER, "", 3),
    Mutation("rows: parity", ROWS, "parity ^= 1;", ""),
    Mutation("rows: lower lanes", ROWS, "(1u << lane_in_warp_) - 1;", "(2u << lane_in_warp_) - 1;"),
    Mutation("rows: list overflows", ROWS, "listed_ > kListCapacity - kTile", "listed_ > kListCapacity"),
    Mutation(
        "rows: column tail", ROWS, "if (column < p_.columns) row[column]", "if (column <= p_.columns) row[column]"
    ),
    Mutation("rows: owner", ROWS, "GroupOfRow(row, p_.groups) == group_", "p_.groups > group_"),
    Mutation("rows: first entry", ROWS, "bit >= kWarp ?", "bit > kWarp ?"),
    Mutation(
        "rows: ballot mask",
        ROWS,
        "__ballot_sync(kAllLanes, row[k] == wanted)",
        "__ballot_sync(0xffffu, row[k] == wanted)",
    ),
    Mutation(
        "rows: range", ROWS, "static_cast<std::uint64_t>(row) < static_cast<std::uint64_t>(p_.rows)", "row < p_.rows"
    ),
    Mutation("clear: edge", ROWS, "if (edge < bytes)", "if (edge <= bytes)"),
    Mutation("clear: lanes", ROWS, "p.row_bytes, lane, kWarp);", "p.row_bytes, lane + 1, kWarp);"),
    Mutation(
        "clear: divergent ballot", ROWS, "if (touched) p.touched_rows[row] = false;", "if (row >= p.rows) return;"
    ),
    Mutation("norms: barrier", NORMS, BARRIER, ""),
    Mutation("norms: shuffle", NORMS, "distance > 0; distance /= 2", "distance > 1; distance /= 2"),
    Mutation("norms: tail", NORMS, "First(k) + kPack <= size_", "First(k) < size_"),
    Mutation(
        "update: end of chunk",
        UPDATE,
        "static_cast<int>(threadIdx.x) < packs) result",
        "static_cast<int>(threadIdx.x) <= packs) result",
    ),
    Mutation("update: rows", UPDATE, "if (left <= 0) {", "if (left < 0) {"),
    Mutation(
        "update: overwrite",
        UPDATE,
        "item_.accumulator != nullptr && !factors_.overwrite",
        "item_.accumulator != nullptr",
    ),
    Mutation("update: applies", UPDATE, "if (!*scalars.applies) return;", ""),
    Mutation("update: corrected rate", UPDATE, "scalars.rate = given.corrected_rate;", ""),
    Mutation("update: bias", "update_rate.h", "+ 1; step != 0", "+ 0; step != 0"),
    Mutation("batch norm: barrier of moments", NORMALIZE, BARRIER, "", 0),
    Mutation("batch norm: barrier of factors", NORMALIZE, BARRIER, "", 1),
    Mutation("batch norm: barrier of gradient sums", GRADIENT, BARRIER, "", 0),
    Mutation("batch norm: barrier of gradient factors", GRADIENT, BARRIER, "", 1),
    Mutation("batch norm: barrier of splits", TILING, BARRIER, ""),
    Mutation(
        "batch norm: tile's end",
        TILING,
        "left < t_.tile_packs ? static_cast<int>(left) : t_.tile_packs",
        "static_cast<int>(left * 0) + t_.tile_packs",
    ),
    Mutation("batch norm: lane", TILING, "if (lane_ >= lanes() ||", "if ("),
    Mutation("batch norm: merge width", TILING, "if (exists && merger == 0)", "if (merger == 0)"),
    Mutation("batch norm: mask", NORMALIZE, "!mask[k * lanes]", "!mask[k]"),
    Mutation(
        "batch norm: early return",
        NORMALIZE,
        "  __syncthreads();\n  if (tile.packs() == 0) return;",
        "  if (tile.packs() == 0) return;\n  __syncthreads();",
    ),
    Mutation("clipping: barrier", CLIP, BARRIER, ""),
    Mutation("clipping: lanes", CLIP, "distance >= place.width", "distance > place.width"),
    Mutation("clipping: edge of a tile", CLIP, "if (column >= tile.units) return;", ""),
    Mutation(
        "clipping: sums of the edge",
        CLIP,
        "thread < place.width && place.column < place.tile.units",
        "thread < place.width",
    ),
    Mutation("clipping: last units", CLIP, "if (unit >= item.units) return;", ""),
    Mutation("clipping: row tile", CLIP, "place.tile.row_tile * place.tiling.units + place.unit", "place.unit"),
    Mutation("clipping: last rows", "clip_tiles.h", "Least(tile_rows, rows - row)", "tile_rows"),
    Mutation("moments: barrier before the flag", MOMENTS, BARRIER, "", 0),
    Mutation("moments: barrier of the flag", MOMENTS, BARRIER, "", 1),
    Mutation("moments: barrier", MOMENTS, BARRIER, "", 2),
    Mutation("moments: finite", MOMENTS, "!args.only_finite || AllFinite<Batch>(args)", "true"),
    Mutation("moments: flag", MOMENTS, "if (args.applies != nullptr && !*args.applies) return;", ""),
    Mutation("moments: window", MOMENTS, "args.merges[blockIdx.x]", "args.merges[0]"),
    Mutation("moments: moving type", MOMENTS, "merge.moving.dtype == DType::kFloat64", "false"),
    Mutation("moments: batch type", MOMENTS, "merge.batch.dtype == DType::kFloat64", "false"),
    Mutation("noise: barrier", NOISE, BARRIER, ""),
    Mutation("noise: sums", NOISE, "params.norms[params.count + i]", "params.norms[i]"),
    Mutation("noise: threads", NOISE, "if (threadIdx.x != 0) return;", ""),
    Mutation("noise: starts", NOISE, "*params.starts}", "false}"),
    Mutation(
        "noise: type of a share",
        NOISE,
        "cuda::ReadScale(params.share)",
        "*static_cast<const float*>(params.share.data)",
    ),
    Mutation("noise: end", NOISE, "ending.scale = *params.scale;", ""),
    Mutation("noise: applies", NOISE, "ending.applies = *params.applies;", "ending.applies = true;"),
    Mutation("noise: one micro-batch", "noise.h", "&& count > 1", ""),
]


def mutate(sources: Path, mutation: Mutation) -> None:
    """Applies a mutation to a copy of the sources."""
    path = sources / "src" / "ops" / "kernels" / mutation.file
    parts = (ROOT / "src" / "ops" / "kernels" / mutation.file).read_text().split(mutation.before)
    if len(parts) < mutation.which + 2:
        raise SystemExit(f"{mutation.name}: {mutation.file} has no {mutation.before!r} any more")
    joints = [mutation.before] * (len(parts) - 1)
    joints[mutation.which] = mutation.after
    path.write_text("".join(part + joint for part, joint in zip(parts, [*joints, ""], strict=True)))


def restore(sources: Path, mutation: Mutation) -> None:
    """Takes a mutation back."""
    kernel = Path("src") / "ops" / "kernels" / mutation.file
    (sources / kernel).write_text((ROOT / kernel).read_text())


def build(sources: Path, tree: Path, sanitizer: str) -> None:
    """Builds what `sanitizer` needs."""
    subprocess.run(
        ["cmake", "--build", str(tree), "--target", f"accumops_emulated_{sanitizer}", "--", "--quiet"],
        check=True,
        cwd=sources,
        stdout=subprocess.DEVNULL,
    )


def verdict(tree: Path, sanitizer: str) -> str | None:
    """Runs the cases. Returns what was noticed, or None."""
    cases = {"address": "few", "thread": "fewest"}[sanitizer]
    script = ROOT / "benchmarks" / "gpu" / "sanitize.py"
    status, output = sanitized.run(
        sanitizer, tree / sanitizer, script, "--device", "emulated", "--seed", 1, "--cases", cases
    )
    if status == 0:
        return None
    for pattern, name in (
        (r"WRONG: ([^,:]*)", "results: {}"),
        (r"ERROR: AddressSanitizer: ([\w-]+)", "address sanitizer: {}"),
        (r"runtime error: ([\w-]+ [\w-]+)", "undefined behaviour: {}"),
        (r"WARNING: ThreadSanitizer: ([\w ]+)", "thread sanitizer: {}"),
        (r"emulated CUDA: ([^,]+)", "emulated GPU: {}"),
    ):
        if match := re.search(pattern, output):
            return name.format(match[1].strip())
    return f"exit status {status}: {output.strip().splitlines()[-1]}"


def main() -> None:
    """Tries all mutations, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of the names")
    only = parser.parse_args().only or ""
    survived = 0
    print("| mutation | file | line changed | noticed by |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        sources = Path(temporary) / "sources"
        for each in ("src", "cmake", "tests/kernels"):
            shutil.copytree(ROOT / each, sources / each)
        shutil.copy(ROOT / "CMakeLists.txt", sources)
        tree = Path(temporary) / "build"
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        subprocess.run(
            [
                *("cmake", "-S", str(sources), "-B", str(tree), "-GNinja", "-DACCUMOPS_CUDA=EMULATED"),
                *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for mutation in MUTATIONS:
            if only not in mutation.name:
                continue
            mutate(sources, mutation)
            noticed = None
            for sanitizer in sanitized.LIBRARIES:
                build(sources, tree, sanitizer)
                noticed = noticed or verdict(tree, sanitizer)
                if noticed:
                    break
            restore(sources, mutation)
            survived += noticed is None
            changed = mutation.before.split("\n")[0].strip()
            print(f"| {mutation.name} | {mutation.file} | `{changed}` | {noticed or '**nobody**'} |", flush=True)
    raise SystemExit(bool(survived))


if __name__ == "__main__":
    main()
