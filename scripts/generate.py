#!/usr/bin/env python
"""Generate images with a base model and the LoRAs trained on it: trainkit/tools/generate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.generate import main

if __name__ == "__main__":
    exit_with_message(main)
