#!/usr/bin/env bash
# Runs the tests, after setting up .venv if need be: scripts/test.sh [--all] [pytest arguments]
# --all adds the slow ones. Tests marked gpu run with neither: they need a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

markers="not slow and not gpu"
if [ "${1:-}" = --all ]; then
  markers="not gpu"
  shift
fi
exec .venv/bin/python -m pytest -m "$markers" "$@"
