#!/usr/bin/env bash
# tensorflow.sh [OUT_DIR] [STAGE...]: checks and times accumops inside TensorFlow on the GPU that is here. Each stage's
# output goes to OUT_DIR (build/gpu/tensorflow), the suites' JSON beside it; a summary comes last, and says with its exit
# status whether all passed. Needs a Python with TensorFlow that sees the GPU, click, rich and pytest, and accumops with its
# compiled ops: installed, or this checkout after `make build`. No network. PYTHON chooses the interpreter.
# Stages, in this order, all of them if none is named: info verify tests trace repeat accumulate update batch-norm window
# models.
# shellcheck disable=SC2329  # stages are called by name
set -u

die() {
  echo "tensorflow.sh: $*" >&2
  exit 2
}

here=$(cd "$(dirname "$0")" && pwd) || exit 2
root=$(cd "$here/../.." && pwd) || exit 2
out=${1:-$root/build/gpu/tensorflow}
[ $# -gt 0 ] && shift
mkdir -p "$out" || die "cannot write to $out"
out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2

python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=1 TF_FORCE_GPU_ALLOW_GROWTH=true
# TensorFlow makes the kernels of a chip that it was not built for when they are first used.
export CUDA_CACHE_MAXSIZE=4294967296

# With a reason and status 2 where there is nothing to check.
"$python" - <<'PY' || exit 2
import sys
import tensorflow as tf
from accumops.ops import library
if not tf.config.list_physical_devices("GPU"):
    sys.exit("TensorFlow sees no GPU (TF_CPP_MAX_VLOG_LEVEL=3 says which library it could not open)")
if (problem := library.load()[1] or library.gpu_problem()) is not None:
    sys.exit(f"The fused ops cannot run on it: {problem}")
PY

run_info() { "$python" -m accumops info; }
run_verify() { timeout 300 "$python" -m accumops verify --device gpu; }

# What is for a GPU alone, and the ops, whose tests put them where TensorFlow would.
run_tests() {
  timeout 300 "$python" -m pytest -p no:cacheprovider -q --durations=10 -m gpu tests &&
    timeout 300 "$python" -m pytest -p no:cacheprovider -q --durations=10 tests/ops tests/window/test_accumulator.py \
      tests/optimizer/test_fused_update.py tests/training/test_train_function.py tests/training/test_slicing.py
}

run_trace() { timeout 200 "$python" "$here/trace_steps.py" --json "$out/trace.json"; }
run_repeat() { timeout 200 "$python" "$here/repeat.py"; }
suite() { timeout "$2" "$python" -m accumops bench "$1" --device GPU --json "$out/$1-gpu.json"; }
run_accumulate() { suite accumulate 200; }
run_update() { suite update 200; }
run_batch-norm() { suite batch-norm 300; }
run_window() { suite window 500; }
run_models() { timeout 500 "$python" "$here/train_models.py" --json "$out/models-gpu.json"; }

summary=()
failed=0
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(info verify tests trace repeat accumulate update batch-norm window models)
for stage in "${stages[@]}"; do
  declare -F "run_$stage" >/dev/null || die "there is no stage '$stage'"
done
for stage in "${stages[@]}"; do
  begin=$SECONDS
  result=PASS
  echo "$stage ..."
  "run_$stage" >"$out/$stage.log" 2>&1 || { result=FAIL && failed=1; }
  cat "$out/$stage.log"
  summary+=("$(printf '%-10s %s %4d s' "$stage" "$result" $((SECONDS - begin)))")
done

printf '%s\n' "" "${summary[@]}" "Logs: $out"
exit "$failed"
