#!/usr/bin/env python
"""Find what is wrong with training images before you train: trainkit/tools/check_dataset.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.check_dataset import main

if __name__ == "__main__":
    exit_with_message(main)
