#!/usr/bin/env bash
# Install into .venv if needed, run the linter and the type checker, then run all tests that are not marked `slow`.
#
#   bash scripts/test.sh fast                                leave out the tests marked `trains`, which take seconds each
#   bash scripts/test.sh tests/test_objective.py -k snr      other arguments go to pytest
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
export PYTHONDONTWRITEBYTECODE= # where it is set, every process of a test compiles all of the code again
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "$chosen" "$@"
