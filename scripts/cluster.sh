#!/usr/bin/env bash
# Serves a tiny sparse-attention model on two hosts, which are network namespaces of this machine
# (as root), asks it one question, and removes all that it made. Sets up .venv if necessary.
# scripts/cluster.sh tp|dp|pd [--fault cut|launcher|scheduler] [--idle] [more flags of both nodes]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.cluster "$@"
