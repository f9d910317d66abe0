#!/usr/bin/env bash
# Install the versions of constraints.txt into .venv. If these files have not changed, the script does nothing.
# quickstart.sh and test.sh call it. PYTHON=python3.12 bash scripts/install.sh uses another Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "install: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1). Next: PYTHON=python3.11 bash $0" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv

wanted=$(cat requirements.txt requirements-dev.txt constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "install: installing into .venv. This is needed once and takes about 2 GB and a few minutes."
  # torch first: the pin decides between the CPU and the CUDA build, and nothing after it may choose another.
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
    -r requirements.txt -r requirements-dev.txt
  echo "$wanted" > .venv/installed
  echo "install: done. Next: bash scripts/quickstart.sh, or .venv/bin/python train_dreambooth_lora_sdxl_advanced.py --help"
fi
