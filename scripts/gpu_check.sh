#!/usr/bin/env bash
# One command on a host with an NVIDIA GPU and no network: kernel tests on the device, then
# benchmarks/kernels.py. docs/gpu.md says which wheels it needs and what it prints.
#
#   scripts/gpu_check.sh [--quick] [--sanitize] [--seconds N] [--no-tests] [--no-bench]
#                        [-- arguments of benchmarks.kernels]
#
# All stages fit in N seconds [570, --quick 230]; a failed one does not stop the next.
#   OUT     folder of kernels.json, kernels.png and gpu_check.log [out]
#   WHEELS  folders of wheels or of a bundle's parts [.whl /tmp/ess_wheels]
#   SITE    where the wheels are installed [/tmp/ess_site]
#   PYTHON  an interpreter with torch, triton, numba, numpy, psutil, pytest, hypothesis [python3]
# Exit status: 0 if every stage passed, 1 if one failed, 2 without a GPU.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-out} SITE=${SITE:-/tmp/ess_site} PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl /tmp/ess_wheels}
JOINED=/tmp/ess_wheels
CUDA_TESTS=tests/kernels/test_cuda_sources.py
TESTS=(tests/kernels tests/tiers/test_device_hot_cache.py)
# Short of the whole: the sanitizer slows a kernel by ten to a hundred times.
SANITIZED=(tests/kernels/test_fetch.py tests/kernels/test_plan.py -k
  "equals_its_reference or plans_one_after_another or empty_lists")
quick=0 sanitize=0 tests=1 bench=1 seconds='' more=()
names=() results=() times=()

usage() {
  sed -n '2,/^set -u/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
  exit 1
}

left() { # seconds of the budget, less what the summary takes
  echo $((seconds - SECONDS - 5))
}

stage() { # name, most seconds, command...: runs it, logs it, keeps what became of it
  local name=$1 most=$2 start=$SECONDS status before
  shift 2
  [ "$most" -le "$(left)" ] || most=$(left)
  names+=("$name")
  if [ "$most" -lt 5 ]; then
    results+=("no time left") times+=(0)
    return 1
  fi
  echo "== $name (at most $most s)" | tee -a "$LOG"
  before=$(stat -c %s "$LOG")
  timeout --kill-after=10 "$most" "$@" >>"$LOG" 2>&1 </dev/null
  status=$?
  tail -c "+$((before + 1))" "$LOG" | tail -n "${TAIL:-15}"
  times+=($((SECONDS - start)))
  case $status in
    0) results+=(passed) ;;
    124 | 137) results+=("stopped after $most s") ;;
    *) results+=("failed, status $status") ;;
  esac
  return "$status"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max \
    --format=csv
  nvcc --version | tail -n 2 | head -n 1
  lscpu | grep -E '^(Model name|CPU\(s\)|NUMA node\(s\))'
  free -g | sed -n 2p
  "$PYTHON" - <<'PY'
import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
sys.exit(0 if torch.cuda.is_available() else 2)
PY
}

install_wheels() {
  local folder found=()
  for folder in $WHEELS; do
    if [ -n "$(find "$folder" -name SHA256SUMS -print -quit 2>/dev/null)" ]; then
      scripts/gpu_bundle.sh --join "$folder" "$JOINED"
    fi
  done
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

build() { # all CUDA C++ sources side by side: each compiler uses one core
  local name jobs=() status=0
  for name in fetch save plan; do
    "$PYTHON" -c "from ess_kernels import cuda_build; cuda_build.load('$name')" &
    jobs+=($!)
  done
  for name in "${jobs[@]}"; do wait "$name" || status=1; done
  return $status
}

run_tests() { # the CUDA C++ tests share their builds, so they have one process; the others several
  local spread=() status=0 log
  log=$(mktemp)
  "$PYTHON" -m pytest -q "$CUDA_TESTS" >"$log" 2>&1 &
  ! "$PYTHON" -c 'import xdist' 2>/dev/null || spread=(-n 8)
  "$PYTHON" -m pytest -q "${spread[@]}" --ignore "$CUDA_TESTS" "${TESTS[@]}" || status=1
  wait $! || status=1
  cat "$log"
  rm -f "$log"
  return $status
}

sanitized() { # tool
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --target-processes all "$PYTHON" -m pytest -q -x "${SANITIZED[@]}"
}

while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --sanitize) sanitize=1 ;;
    --no-tests) tests=0 ;;
    --no-bench) bench=0 ;;
    --seconds) seconds=${2:-} && shift ;;
    --)
      shift
      more=("$@")
      break
      ;;
    *) usage ;;
  esac
  shift
done
[ -n "$seconds" ] || seconds=$([ $quick = 1 ] && echo 230 || echo 570)
[[ $seconds =~ ^[0-9]+$ ]] || usage
[ $quick = 0 ] || more=(--quick "${more[@]}")

mkdir -p "$OUT"
LOG=$OUT/gpu_check.log
: >"$LOG"
export PYTHONPATH="$SITE:python:kernels:patches:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$PATH:$SITE/bin:/usr/local/cuda/bin"
[ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
export -f facts install_wheels build run_tests sanitized
export PYTHON SITE WHEELS JOINED CUDA_TESTS

in_shell() { # a function above in a shell of its own, so that `timeout` can end it
  local lists
  lists=$(declare -p TESTS SANITIZED)
  echo "$lists; $*"
}

stage facts 30 bash -c "$(in_shell facts)"
if [ $? = 2 ]; then
  echo "gpu_check: a CUDA device must be there: got none." >&2
  exit 2
fi
stage wheels 90 bash -c "$(in_shell install_wheels)"
stage build 120 bash -c "$(in_shell build)"
if [ $tests = 1 ]; then
  TAIL=40 stage tests $((seconds / 2)) bash -c "$(in_shell run_tests)"
fi
if [ $sanitize = 1 ]; then
  for tool in memcheck racecheck; do
    stage "$tool" $((seconds / 4)) bash -c "$(in_shell sanitized $tool)"
  done
fi
if [ $bench = 1 ]; then
  rest=$(left)
  # What is running when --seconds end is finished, and the files are written.
  TAIL=400 stage bench "$rest" "$PYTHON" -m benchmarks.kernels --json "$OUT/kernels.json" \
    --plot "$OUT/kernels.png" --seconds $((rest > 60 ? rest - 40 : rest / 2)) "${more[@]}"
fi

status=0
echo
printf '%-10s %6s  %s\n' stage s result
for i in "${!names[@]}"; do
  printf '%-10s %6s  %s\n' "${names[$i]}" "${times[$i]}" "${results[$i]}"
  [ "${results[$i]}" = passed ] || status=1
done
echo "in $SECONDS s; gpu_check.log, kernels.json and kernels.png are in $OUT"
exit $status
