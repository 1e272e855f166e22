#!/usr/bin/env bash
# Serves a tiny sparse-attention model on this machine, one-tier and then with ESS, and asks both
# the same questions on long documents. Sets up .venv if necessary.
# scripts/demo.sh [--arch v32|glm] [more flags of launch_server]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.demo "$@"
