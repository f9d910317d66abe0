#!/usr/bin/env python
"""Measure how far a LoRA moves the base model towards its style: trainkit/tools/evaluate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.evaluate import main

if __name__ == "__main__":
    exit_with_message(main)
