#!/usr/bin/env bash
# Install everything into .venv at the first run (Python 3.11 or newer, about 2 GB of disk). Then run scripts/quickstart.py,
# which says at its top what it does and what it leaves.
#
#   bash scripts/quickstart.sh [OUTPUT_DIR]          default: runs/quickstart
#
# This is a shorter trial; TOKENS=0 trains the LoRA alone:
#
#   STEPS=20 DENOISING_STEPS=2 bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py "$@"
