#!/usr/bin/env bash
# Install into .venv if needed, lint, check types, then run the whole suite (marked `slow` excepted) and close with pytest's summary.
# `fast` leaves out what trains or draws for seconds, the tests marked `trains`: bash scripts/test.sh fast
# Other arguments go to pytest: bash scripts/test.sh tests/test_objective.py -k snr
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chosen="not slow"
if [[ "${1:-}" == fast ]]; then
    chosen="not slow and not trains"
    shift
fi
bash scripts/install.sh

# Two busy threads on one loaded core are ten times slower than one thread: one thread a process.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist loadgroup -m "$chosen" "$@"
