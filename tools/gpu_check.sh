#!/usr/bin/env bash
# One command on a host with an NVIDIA GPU and no network: everything that needs the device, stage
# by stage. docs/gpu.md says which host, what has to be carried there, and what each stage prints.
#
#   tools/gpu_check.sh [--stages LIST] [--quick] [--seconds N] [-- arguments]
#   tools/gpu_check.sh --receive      keep the parts of a bundle that were carried, and end
#
# LIST, separated by commas; they run in this order [facts,wheels,tests,bench]:
#   facts    the card, the driver, versions: always
#   wheels   what the kernel stages need, from the bundle, into SITE
#   install  what serving needs, from the bundle, into VENV, where later stages run from then on
#   tests    the kernel tests on the device
#   memcheck, racecheck, synccheck, initcheck: some of them under that tool of compute-sanitizer
#   bench    benchmarks.kernels: kernels.json, kernels.png
#   exact    tests/gpu: two tiers give one tier's logprobs
#   serving  tools.gpu_serving: gpu_serving.json, gpu_serving.png; both: logs.tar.gz
#   predict  tools.predict_gpu: the simulator beside both: predict_gpu.json, predict_gpu.png
#
# All fit in N seconds [570, --quick 230]; a failed one does not stop the next. bench, exact and
# serving share what the others leave. The arguments, and --quick, go to the last of bench,
# serving and predict. --receive: exit status 1 while parts are missing, or if one is spoilt.
#   OUT     folder of the files above and of gpu_check.log, with every stage's output [out]
#   WHEELS  folders of wheels or of a bundle's parts [.whl]
#   JOINED  [/tmp/ess_wheels]   SITE  [/tmp/ess_site]   VENV  [/tmp/ess_venv]
#   WORK    models, engines' logs, results for later calls [/tmp/ess_work]
#   PYTHON  an interpreter with torch, triton, numba, numpy, psutil, pytest, hypothesis [python3]
# Exit status: 0 if every stage passed, 1 if one failed, 2 without a GPU.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-out} SITE=${SITE:-/tmp/ess_site} VENV=${VENV:-/tmp/ess_venv} PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl} JOINED=${JOINED:-/tmp/ess_wheels} WORK=${WORK:-/tmp/ess_work}
ALL=(facts wheels install tests memcheck racecheck synccheck initcheck bench exact serving predict)
PREDICT_SECONDS=60
LOG_BYTES=$((12 << 20)) # of gpu_check.log: a file larger than 16 MiB does not come back
stages=facts,wheels,tests,bench quick=0 seconds='' receive=0 more=()
names=() results=() times=()

usage() {
  sed -n '2,/^set -u/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
  exit 1
}

wanted() { [[ ",$stages," == *",$1,"* ]]; }

left() { # seconds of the budget, less what the summary takes
  echo $((seconds - SECONDS - 5))
}

most_of() { # stage: its most seconds
  local name sharing=0 rest reached=0
  case $1 in
    facts) echo 30 ;;
    wheels) echo 90 ;;
    install) echo 300 ;;
    tests) echo $((seconds / 2)) ;;
    memcheck | racecheck | synccheck | initcheck) echo $((seconds / 4)) ;;
    predict) echo $PREDICT_SECONDS ;;
    *) # what the others leave, shared with those still to come
      for name in bench exact serving; do
        [ "$name" != "$1" ] || reached=1
        [ $reached = 0 ] || ! wanted "$name" || sharing=$((sharing + 1))
      done
      rest=$(left)
      ! wanted predict || rest=$((rest - PREDICT_SECONDS))
      echo $((rest / sharing))
      ;;
  esac
}

stage() { # name, arguments...: runs it, logs it, keeps what became of it
  local name=$1 start=$SECONDS most before status
  most=$(most_of "$name")
  [ "$most" -le "$(left)" ] || most=$(left)
  names+=("$name")
  if [ "$most" -lt 5 ]; then
    results+=("no time left") times+=(0)
    return 1
  fi
  echo "== $name (at most $most s)" | tee -a "$LOG"
  before=$(stat -c %s "$LOG")
  MOST=$most timeout --kill-after=10 "$most" tools/gpu_stage.sh "$@" >>"$LOG" 2>&1 </dev/null
  status=$?
  tail -c "+$((before + 1))" "$LOG" | tail -n 60 | cut -c1-300
  times+=($((SECONDS - start)))
  case $status in
    0) results+=(passed) ;;
    124 | 137) results+=("stopped after $most s") ;;
    *) results+=("failed, status $status") ;;
  esac
  return "$status"
}

enter() { # the stages to come run in VENV if its installation is complete, else with SITE
  local ours=$PWD/python:$PWD/kernels:$PWD/patches:$PWD
  if [ -f "$VENV/complete" ]; then
    PYTHON=$VENV/bin/python PATH=$VENV/bin:$first_path PYTHONPATH=$ours
  else
    PATH=$first_path:$SITE/bin PYTHONPATH=$SITE:$ours${first_pythonpath:+:$first_pythonpath}
  fi
}

summary() { # a line for each stage; 1 if one did not pass
  local i status=0
  for i in "${!names[@]}"; do
    printf '%-10s %6s s  %s\n' "${names[$i]}" "${times[$i]}" "${results[$i]}"
    [ "${results[$i]}" = passed ] || status=1
  done
  return "$status"
}

while [ $# -gt 0 ]; do
  case $1 in
    --receive) receive=1 ;;
    --stages) stages=${2:-} && shift ;;
    --quick) quick=1 ;;
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
for name in ${stages//,/ }; do [[ " ${ALL[*]} " == *" $name "* ]] || usage; done
[ -n "$seconds" ] || seconds=$([ $quick = 1 ] && echo 230 || echo 570)
[[ $seconds =~ ^[0-9]+$ ]] || usage
[ $quick = 0 ] || more=(--quick "${more[@]}")

mkdir -p "$OUT" "$WORK"
OUT=$(realpath "$OUT")
LOG=$OUT/gpu_check.log
: >"$LOG"
first_path=$PATH:/usr/local/cuda/bin first_pythonpath=${PYTHONPATH:-}
[ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
export OUT SITE VENV PYTHON WHEELS WORK JOINED PATH PYTHONPATH PYTHONUNBUFFERED=1
if [ $receive = 1 ]; then
  tools/gpu_stage.sh receive 2>&1 | tee "$LOG"
  exit "${PIPESTATUS[0]}"
fi

enter
stage facts
if [ $? = 2 ]; then
  echo "gpu_check: a CUDA device must be there: got none." >&2
  exit 2
fi
last=''
for name in bench serving predict; do ! wanted "$name" || last=$name; done
for name in "${ALL[@]:1}"; do
  wanted "$name" || continue
  if [ "$name" = "$last" ]; then stage "$name" "${more[@]}"; else stage "$name"; fi
  [ "$name" != install ] || enter
done

echo
summary | tee -a "$LOG"
status=${PIPESTATUS[0]}
if [ "$(stat -c %s "$LOG")" -gt $LOG_BYTES ]; then
  tail -c $LOG_BYTES "$LOG" >"$LOG.end" && mv "$LOG.end" "$LOG"
fi
echo "in $SECONDS s; the files are in $OUT"
exit "$status"
