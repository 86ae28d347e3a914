#!/usr/bin/env bash
# kernels.sh [OUT_DIR]: builds the kernels for the GPU that is here, tests them, runs them under compute-sanitizer and
# times them. Each stage's output goes to OUT_DIR (build/gpu/logs); a summary comes last, and says with its exit status
# whether all passed. Needs neither a network nor TensorFlow, but Python with NumPy, pytest, pybind11 and CuPy, CMake,
# ninja, nvcc and compute-sanitizer. PYTHON chooses the interpreter; CMAKE_ARGS is passed on.
# shellcheck disable=SC2329  # stages are called by name
set -u

die() {
  echo "kernels.sh: $*" >&2
  exit 2
}

here=$(cd "$(dirname "$0")" && pwd) || exit 2
root=$(cd "$here/../.." && pwd) || exit 2
out=${1:-$root/build/gpu/logs}
mkdir -p "$out" || die "cannot write to $out"
out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2

python=${PYTHON:-python3}
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

for tool in "$python" cmake ninja nvcc compute-sanitizer; do
  command -v "$tool" >/dev/null || die "$tool was not found; put it on PATH"
done
"$python" -c 'import numpy, pytest, pybind11' || die "$python lacks a package"
architecture=$("$python" "$here/backend.py") || die "nothing to check without a GPU and CuPy"
version=$("$python" -c 'import sys; print(sys.implementation.cache_tag)') || exit 2
build=$root/build/gpu/$version-sm_$architecture
export ACCUMOPS_KERNELS_DIR=$build

build() {
  local arguments
  read -ra arguments <<<"${CMAKE_ARGS:-}"
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DACCUMOPS_TENSORFLOWS=OFF -DACCUMOPS_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
    -DCMAKE_CUDA_FLAGS="-lineinfo -Xptxas=-v" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" "${arguments[@]}" &&
    cmake --build "$build" --target accumops_python
}

# A run that skips the GPU passes too.
tests() {
  timeout 300 "$python" -m pytest tests/kernels -p no:cacheprovider -q --durations=10 || return
  if grep -qE "no CUDA device|could not import 'cupy'|built without CUDA" "$out/tests.log"; then
    echo "The tests have left out the GPU."
    return 1
  fi
}

# Calls that fail inside CuPy are its own affair; ours raise, and fail the script.
sanitize() {
  local options=()
  [ "$1" = memcheck ] && options=(--padding 256 --report-api-errors no)
  timeout 150 compute-sanitizer --tool "$1" --error-exitcode 1 "${options[@]}" "$python" "$here/sanitize.py"
}

summary=()
failed=0

# stage NAME COMMAND...: runs it, and adds a line with the last one of its output to the summary.
stage() {
  local name=$1 begin=$SECONDS result=PASS
  shift
  echo "$name ..."
  "$@" >"$out/$name.log" 2>&1 || result=FAIL
  summary+=("$(printf '%-10s %s %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$(tail -n 1 "$out/$name.log")")")
  [ "$result" = PASS ] && return
  failed=1
  tail -n 40 "$out/$name.log"
  return 1
}

if stage build build; then
  stage tests tests
  stage cases timeout 100 "$python" "$here/sanitize.py"
  for tool in memcheck racecheck initcheck synccheck; do
    stage "$tool" sanitize "$tool"
  done
  stage time timeout 240 "$python" "$here/time_kernels.py" --json "$out/time.json"
  cat "$out/time.log"
fi

printf '%s\n' "" "${summary[@]}" "Logs: $out"
exit "$failed"
