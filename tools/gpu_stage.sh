#!/usr/bin/env bash
# One stage of tools/gpu_check.sh, which says what each does and starts it with a time limit:
#   tools/gpu_stage.sh NAME [arguments of its program]
# Environment, all set by gpu_check.sh: its own OUT, WHEELS, SITE, VENV, WORK, PYTHON; JOINED,
# where wheels go as parts of a bundle arrive; MOST, the seconds the stage has.
# Exit status: 0 if it passed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

TESTS=(tests/kernels tests/tiers/test_hot_cache_cuda.py)
# Small shapes, and our kernels alone: the sanitizer slows a kernel by ten to a hundred times.
SANITIZED=(tests/kernels/test_plan_fetch.py -m "not slow" -k
  "test_fetch or install or copy_rows or warm_up or wrap or one_after_another and not sixteen")
SLICE=(--layers 4 --experts 8) # of the model that `serving` serves

receive() { # joins what was carried with what came before: 1 while something is to come
  local folder status=0
  for folder in $WHEELS; do
    [ -n "$(find "$folder" -name SHA256SUMS -print -quit 2>/dev/null)" ] || continue
    tools/gpu_bundle.sh --join "$folder" "$JOINED" || status=1
  done
  return "$status"
}

facts() { # exit status 2: no device
  nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max \
    --format=csv
  nvcc --version | tail -n 2 | head -n 1
  lscpu | grep -E '^(Model name|CPU\(s\)|NUMA node\(s\))'
  free -g | sed -n 2p
  df -h /tmp | tail -n 1
  "$PYTHON" - <<'PY'
import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
sys.exit(0 if torch.cuda.is_available() else 2)
PY
}

wheels() {
  local folder wheel found=()
  receive
  for folder in $WHEELS $JOINED; do
    for wheel in "$folder"/*.whl; do
      [ ! -f "$wheel" ] || [[ " ${found[*]##*/} " == *" ${wheel##*/} "* ]] || found+=("$wheel")
    done
  done
  echo "${#found[@]} wheels"
  [ ${#found[@]} -gt 0 ] || return 1
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$SITE" "${found[@]}"
}

install() {
  rm -f "$VENV/complete"
  receive && tools/gpu_install.sh "$PYTHON" "$JOINED" "$VENV" && compute && touch "$VENV/complete"
}

compute() { # the device takes the libraries, whose code for other cards did not travel
  "$VENV/bin/python" - <<'PY'
import torch
from sgl_kernel import moe_align_block_size  # noqa: F401  its library for this card loads
a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
wanted = (a.float().cpu() @ a.float().cpu()).sort(-1).values
error = ((a @ a).float().sort(-1).values.cpu() - wanted).norm() / wanted.norm()
print(f"a product and a sort on the device differ from the host's by {error:.1e}")
assert error < 1e-2
PY
}

tests() { # in several processes where xdist is there
  local spread=()
  ! "$PYTHON" -c 'import xdist' 2>/dev/null || spread=(-n 8)
  "$PYTHON" -m pytest -q "${spread[@]}" "${TESTS[@]}" || return 1
}

sanitized() { # tool
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --kernel-name kns=ess --target-processes all "$PYTHON" -m pytest -q -x "${SANITIZED[@]}"
}

memcheck() { sanitized memcheck; }

racecheck() { sanitized racecheck; }

synccheck() { sanitized synccheck; }

initcheck() { sanitized initcheck; }

measure() { # name, module, arguments...: a benchmark that writes name.json and name.png
  local name=$1 module=$2 rest=$((MOST > 60 ? MOST - 40 : MOST / 2)) status
  shift 2
  # What is running when --seconds end is finished, and the files are written.
  "$PYTHON" -m "$module" --json "$OUT/$name.json" --plot "$OUT/$name.png" --seconds $rest "$@"
  status=$?
  cp "$OUT/$name.json" "$WORK/" # OUT may be emptied before the next call
  return "$status"
}

bench() { measure kernels benchmarks.kernels "$@"; }

exact() {
  local status
  rm -rf "$WORK/exact"
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' || return # else: all skipped
  # The rest of MOST is for engines that do not answer any more, and for the report.
  ESS_GPU_ENDS=$(($(date +%s) + MOST - 45)) "$PYTHON" -m pytest -q -s -p no:cacheprovider \
    --tb=short -m gpu --basetemp "$WORK/exact" tests/gpu
  status=$?
  pack_logs
  return "$status"
}

pack_logs() { # of all engines so far
  find "$WORK" -name '*.log' -size -64M -print0 | tar -czf "$OUT/logs.tar.gz" --null -T -
}

serving() {
  local costs=() table=$WORK/kernels.json status
  if [ ! -f "$WORK/slice/config.json" ]; then
    "$PYTHON" -m sglang_ess.slice_model --out "$WORK/slice" "${SLICE[@]}" || return
  fi
  # bench may have run out of time before its cost table was whole
  ! "$PYTHON" -c "from sglang_ess.attention.overlap import CostTable; CostTable.read('$table')" ||
    costs=(--overlap-costs "$table")
  measure gpu_serving tools.gpu_serving --model "$WORK/slice" --logs "$WORK/serving" \
    "${costs[@]}" "$@"
  status=$?
  pack_logs
  return "$status"
}

predict() {
  "$PYTHON" -m tools.predict_gpu --kernels "$WORK/kernels.json" \
    --serving "$WORK/gpu_serving.json" --json "$OUT/predict_gpu.json" \
    --plot "$OUT/predict_gpu.png" "$@"
}

"$@"
