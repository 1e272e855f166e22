#!/usr/bin/env bash
# Runs the tests, after setting up .venv if need be: scripts/test.sh [--all] [pytest arguments]
# --all adds the slow ones. Tests marked gpu run with neither: they need a CUDA device.
# The quick ones run in two processes, or as many as -n of pytest-xdist says (-n 0: in this one).
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
