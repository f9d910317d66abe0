#!/usr/bin/env bash
# Install into .venv on first use (Python 3.11+, about 2 GB of disk), then run scripts/quickstart.py: it teaches the shipped
# SDXL model the look of 22 real 3-D icons, and shows what the model learned on nouns it was not taught.
#
#   bash scripts/quickstart.sh [OUTPUT_DIR]                        default: runs/quickstart
#   STEPS=20 DENOISING_STEPS=2 bash scripts/quickstart.sh          a quick trial; TOKENS=0 trains the LoRA alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py "$@"
