#!/usr/bin/env python
"""Merge LoRAs into one, or into a base model: trainkit/tools/merge_loras.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.merge_loras import main

if __name__ == "__main__":
    exit_with_message(main)
