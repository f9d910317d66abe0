#!/usr/bin/env python
"""Write a LoRA in the layout of another program: trainkit/tools/convert_lora.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.convert_lora import main

if __name__ == "__main__":
    exit_with_message(main)
