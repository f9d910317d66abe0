#!/usr/bin/env python
"""Write the difference of two models as a LoRA: trainkit/tools/extract_lora.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.extract_lora import main

if __name__ == "__main__":
    exit_with_message(main)
