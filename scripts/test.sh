#!/usr/bin/env bash
# Sets up .venv if necessary and runs the tests: scripts/test.sh [--all] [pytest arguments]
# --all adds the slow tests. Neither runs tests marked gpu, which need a CUDA device.
# The quick tests run in two processes; -n of pytest-xdist changes that (-n 0: in this process).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

markers="not slow and not gpu"
processes=(-n 2)
if [ "${1:-}" = --all ]; then
  markers="not gpu"
  processes=()
  shift
fi
exec .venv/bin/python -m pytest "${processes[@]}" -m "$markers" "$@"
