#!/usr/bin/env bash
# Serves a tiny sparse-attention model on this machine and sends it long prompts, after setting
# up .venv if need be: scripts/demo.sh [--arch v32|glm] [more flags of launch_server]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.demo "$@"
