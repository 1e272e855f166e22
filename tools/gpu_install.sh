#!/usr/bin/env bash
# Installs a bundle of gpu_bundle.sh, and this checkout, into a virtual environment on a GPU host
# without network. It can be called as parts arrive: each call takes what is there.
#
#   tools/gpu_install.sh [PYTHON [FROM [VENV]]]
#
# Defaults: python3, whose packages VENV sees behind its own; .whl, a folder of parts or of wheels;
# /tmp/ess_venv, made if it is not there. Parts are joined in JOINED [/tmp/ess_wheels].
# Prints a line for each thing that is missing. Exit status: 0 if VENV/bin/python can serve, 1 if
# something is missing, 2 if a wheel could not be installed. LISTED: what is wanted
# [tools/gpu_wheels.txt].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${1:-python3} FROM=${2:-.whl} VENV=${3:-/tmp/ess_venv}
JOINED=${JOINED:-/tmp/ess_wheels}
LISTED=${LISTED:-tools/gpu_wheels.txt}
export LISTED

say() { echo "gpu_install: $*" >&2; }

join_parts() { # sets FROM and, if wheels are still to come, status
  [ -n "$(find "$FROM" -name SHA256SUMS -print -quit 2>/dev/null)" ] || return 0
  PYTHON=$PYTHON tools/gpu_bundle.sh --join "$FROM" "$JOINED" || status=1
  FROM=$JOINED
}

install_wheels() { # those that came since the last call
  local wheel new=() stamps=$VENV/ess_wheels
  mkdir -p "$stamps"
  for wheel in "$FROM"/*.whl; do
    [ ! -f "$wheel" ] || [ "$stamps/${wheel##*/}" -nt "$wheel" ] || new+=("$wheel")
  done
  [ ${#new[@]} -gt 0 ] || return 0
  # --ignore-installed: of the host's versions nothing is removed.
  "$PYTHON" -m pip --python "$VENV/bin/python" --disable-pip-version-check install --quiet \
    --no-index --no-deps --no-compile --no-cache-dir --ignore-installed "${new[@]}" || {
    say "pip must install what came: got the error above. Correct it and call this again."
    exit 2
  }
  for wheel in "${new[@]}"; do touch "$stamps/${wheel##*/}"; done
  # A server's first start would compile thousands of modules, on one core.
  [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] ||
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV"/lib/python3.*/site-packages >/dev/null || true
  say "${#new[@]} wheels installed in $SECONDS s"
}

status=0
join_parts
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv --without-pip "$VENV"
"$PYTHON" tools/gpu_site.py host "$VENV"
install_wheels
[ "$status" = 0 ] || exit 1 # join has said what is to come
"$VENV/bin/python" tools/gpu_site.py finish "$VENV" || exit 1
say "$VENV/bin/python can serve, $SECONDS s"
