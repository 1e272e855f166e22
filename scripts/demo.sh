#!/usr/bin/env bash
# Serves a small trained model with sparse attention, one-tier and then with ESS, and asks both
# the same questions on long documents. Sets up .venv if necessary.
# scripts/demo.sh [--model DIR] [more flags of launch_server]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.demo "$@"
