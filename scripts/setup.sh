#!/usr/bin/env bash
# Makes .venv at the project root, or does nothing if it is up to date. The other scripts call it.
# PYTHON=... names the interpreter (3.11 or newer; tested with 3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAMP=.venv/sglang-ess-setup
LOG=.venv/setup.log

say() { echo "setup: $*" >&2; }

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

install_packages() { # apt package names
  if ! can_install; then
    say "these system packages must be installed first: $*. Run sudo apt-get install $*"
    exit 1
  fi
  say "installing $* by apt-get"
  apt-get update -qq </dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" \
    </dev/null >/dev/null
}

find_python() { # prints the first interpreter that is new enough
  local name
  for name in ${PYTHON:-python3.11 python3}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

make_venv() {
  local python version
  if ! command -v "${PYTHON:-python3}" >/dev/null && [ -z "${PYTHON:-}" ]; then
    install_packages python3 python3-venv
  fi
  if ! python=$(find_python); then
    say "Python must be 3.11 or newer: got $("${PYTHON:-python3}" --version 2>&1)." \
      "Install python3.11 and python3.11-venv, or set PYTHON to an interpreter."
    exit 1
  fi
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then # a package of its own on Debian
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    install_packages "$version-venv"
  fi
  "$python" -m venv --clear .venv
}

install_openmp() { # without it numba uses another thread pool, which is not tested
  PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep 'libgomp\.so\.1 ' >/dev/null && return
  if can_install; then
    install_packages libgomp1
  else
    say "libgomp1 should be installed: got none. Run sudo apt-get install libgomp1"
  fi
}

install_transport() { # libraries that Mooncake needs to move KV between servers
  local missing
  missing=$(for library in ibverbs:libibverbs1 rdmacm:librdmacm1 numa:libnuma1 curl:libcurl4 \
    uring:liburing2; do
    PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep "lib${library%%:*}\.so\." >/dev/null ||
      echo "${library##*:}"
  done)
  [ -n "$missing" ] || return 0
  if can_install; then
    # shellcheck disable=SC2086  # one word per package
    install_packages $missing
  else
    say "for prefill-decode disaggregation these should be installed:" $missing
  fi
}

install_project() { # runs pip in the background and prints a line of its log every 15 s
  local total pid
  total=$(grep -c == constraints.txt)
  say "installing SGLang, torch and what they need ($total packages, 11 GB):" \
    "about 4 minutes; log: $LOG"
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
    -c constraints.txt -e '.[test,dev]' </dev/null >"$LOG" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    [ $((SECONDS % 15)) != 0 ] ||
      say "$SECONDS s, $(grep -c ^Collecting "$LOG") of $total:" \
        "$(tail -n 1 "$LOG" | cut -c 1-60)"
  done
  if ! wait "$pid"; then
    tail -n 20 "$LOG" >&2
    say "pip must succeed: got the error above. Correct its cause and run this again."
    exit 1
  fi
  trap - EXIT
}

fingerprint() { # includes the path, because a virtual environment cannot be moved
  { pwd; cat pyproject.toml constraints.txt; } | sha256sum
}

if [ "$(cat "$STAMP" 2>/dev/null)" != "$(fingerprint)" ]; then
  .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
  install_openmp
  install_transport
  install_project
  fingerprint >"$STAMP"
  say "done in $SECONDS s"
fi
