#!/usr/bin/env python
"""Write the CLIP image features of training images into one file: trainkit/tools/extract_clip_features.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.extract_clip_features import main

if __name__ == "__main__":
    exit_with_message(main)
