#!/usr/bin/env bash
# Serves a tiny sparse-attention model with prefill and decode apart, the decode node with ESS, on
# this machine's free ports, and asks it one question. Sets up .venv if necessary.
# scripts/pd.sh [--once] [--model-path DIR] [--arch v32|glm] [more flags of both nodes]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.pd "$@"
