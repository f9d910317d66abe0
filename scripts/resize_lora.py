#!/usr/bin/env python
"""Make a LoRA smaller, and say what is lost: trainkit/tools/resize_lora.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.resize_lora import main

if __name__ == "__main__":
    exit_with_message(main)
