#!/usr/bin/env bash
# Everything that only a GPU shows, in calls of at most nine minutes: see benchmarks/on_gpu.py.
#
#     bash benchmarks/on_gpu.sh --seconds 540 --results build/on_gpu/results.json
#
# Nothing has to be installed but torch, transformers, accelerate, pytest and what they need; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$@"
